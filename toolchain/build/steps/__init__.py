"""The build steps, one per file. Each step takes a `Job` and fills the job's folder; no step calls another step."""
