"""Runs the command line for `python -m toolchain`."""

import sys

if not sys.flags.safe_path:
    # The working directory may be an unchecked bundle, whose files must not replace libraries.
    del sys.path[0]

from toolchain.cli import main

if __name__ == "__main__":
    sys.exit(main())
