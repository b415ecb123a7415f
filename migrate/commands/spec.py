"""pymigrate spec: write a config.json that can be moved."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-b", "--bundle", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)"
    )


def run(args: argparse.Namespace) -> int:
    from migrate.errors import UsageError
    from runtime.default_spec import default_spec

    path = args.bundle / "config.json"
    try:
        with path.open("x") as file:
            json.dump(default_spec(), file, indent=4)
            file.write("\n")
    except FileExistsError:
        raise UsageError(f"{path} exists already", remedy="remove it, or choose another directory") from None
    return 0
