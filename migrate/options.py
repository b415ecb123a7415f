"""The command lines that people type, and no engine: read with argparse."""

import argparse
from types import ModuleType
from typing import NoReturn

from migrate.errors import UsageError
from migrate.flags import Values


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as one line through the same path as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def parse(command: ModuleType, program: str, text: str, argv: list[str], glob: Values) -> argparse.Namespace:
    """The arguments of a verb, with the global options, which --debug and --json may also follow."""
    parser = _Parser(prog=program, description=text[0].upper() + text[1:] + ".")
    for name in ("debug", "json"):
        parser.add_argument(f"--{name}", action="store_true", default=getattr(glob, name), help=argparse.SUPPRESS)
    command.add_arguments(parser)
    args = parser.parse_args(argv)
    glob.json = args.json
    args.root, args.log, args.log_format = glob.root, glob.log, glob.log_format
    return args
