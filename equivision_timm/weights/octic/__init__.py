"""The room of octic-vits (https://github.com/davnords/octic-vits): its files in, state dicts of ours out."""
