"""`python -m equivision_timm`."""

import sys

from equivision_timm.cli import main
from equivision_timm.starting import raise_on_ctrl_c

if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
