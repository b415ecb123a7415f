"""Parse the verbs that people type and engines do not, with argparse."""

import argparse
from types import ModuleType
from typing import Any, NoReturn

from migrate.cli.flags import Values
from migrate.errors import UsageError


class _Parser(argparse.ArgumentParser):
    """A parser for a verb or for an action of it. Both accept the global --debug and --json.

    It raises UsageError for a bad command line, which is reported in one line like every other error.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("debug", "json"):
            self.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def parse(command: ModuleType, program: str, text: str, argv: list[str], glob: Values) -> argparse.Namespace:
    """Return the arguments of a verb, together with the global options. Raises UsageError."""
    parser = _Parser(prog=program, description=text[0].upper() + text[1:] + ".")
    command.add_arguments(parser)
    read = parser.parse_intermixed_args if getattr(command, "INTERMIXED", False) else parser.parse_args
    args = read(argv, argparse.Namespace(debug=glob.debug, json=glob.json))
    glob.json = args.json
    args.root, args.log, args.log_format = glob.root, glob.log, glob.log_format
    return args
