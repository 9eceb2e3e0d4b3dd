"""Our weights: model folders, checks, publication; one closed room for each foreign format."""
