"""`python -m equivision_timm`, and the console script `equivision-timm`."""

import sys

from equivision_timm.cli.main import main
from equivision_timm.starting import raise_on_ctrl_c

__all__ = ["run"]


def run() -> int:
    """Run the command line of this process; returns its exit status."""
    raise_on_ctrl_c()
    return main()


if __name__ == "__main__":
    sys.exit(run())
