"""`python -m toolchain` is the console script."""

import sys

from toolchain.cli import main

if __name__ == "__main__":
    sys.exit(main())
