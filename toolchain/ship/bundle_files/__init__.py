"""Files and templates from which `ship` makes a bundle. The scripts of a bundle run without the package `toolchain`."""
