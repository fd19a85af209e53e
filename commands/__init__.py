"""The commands of the command line, one per module: each takes its options and returns a `Result`."""
