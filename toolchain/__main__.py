"""`python -m toolchain` is the console script."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory, which may be an unchecked bundle: no file in it stands in for a library

from toolchain.cli import main

if __name__ == "__main__":
    sys.exit(main())
