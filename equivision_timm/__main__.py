"""`python -m equivision_timm`; its `main` is also the console script `equivision-timm`."""

import sys

from equivision_timm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
