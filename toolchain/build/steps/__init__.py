"""The build steps, one a file: each takes a `Job` and fills its folder. No step calls another."""
