"""Runs the command line for `python -m toolchain`."""

import sys

if not sys.flags.safe_path:
    # Python looks for modules in the working directory first. The working directory may be a bundle that nobody has
    # checked. Without this line, Python could import a file of the bundle instead of a library with the same name.
    del sys.path[0]

from toolchain.cli import main

if __name__ == "__main__":
    sys.exit(main())
