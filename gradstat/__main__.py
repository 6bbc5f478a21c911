"""``python -m gradstat`` is the console script ``gradstat``."""

import sys

from gradstat.cli import main

if __name__ == "__main__":
    sys.exit(main())
