"""`python -m migrate.cli`: the command line where no launcher is installed."""

from migrate.cli import entry

entry()
