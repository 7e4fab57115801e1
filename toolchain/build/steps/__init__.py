"""The steps: one verb a file. Each takes a `Job` and fills its folder, or measures, or compares; none calls another."""
