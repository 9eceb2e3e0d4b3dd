"""`python -m equivision_timm`."""

import sys

from equivision_timm.cli import main

if __name__ == "__main__":
    sys.exit(main())
