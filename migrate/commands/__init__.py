"""One verb, one module: `add_arguments(parser)` and `run(args) -> exit code`."""
