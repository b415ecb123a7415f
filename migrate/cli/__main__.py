"""`python -m migrate.cli`: the command line where no launcher is installed."""

from migrate.cli.main import entry

entry()
