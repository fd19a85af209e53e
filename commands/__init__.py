"""The commands of the command line, one a module: each takes its options and returns a `Result` to be printed."""
