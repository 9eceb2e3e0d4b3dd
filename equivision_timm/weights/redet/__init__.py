"""ReDet (Han et al., https://github.com/csuhan/ReDet): checkpoints of its ReResNets become state dicts of ours."""
