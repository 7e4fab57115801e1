"""Runs the command line for `python -m toolchain`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory; it may be an unchecked bundle, whose files must not replace libraries

from toolchain.cli import main

if __name__ == "__main__":
    sys.exit(main())
