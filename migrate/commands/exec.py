"""pymigrate exec ID CMD [ARG...]: run a program in a running container, with our own stdin, stdout and stderr."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable (repeatable)"
    )
    parser.add_argument("--cwd", metavar="DIR", help="working directory in the container")
    parser.add_argument("-u", "--user", metavar="UID[:GID]", help="run as this user")
    parser.add_argument("-d", "--detach", action="store_true", help="return when it runs")
    parser.add_argument("--pid-file", type=Path, metavar="FILE", help="write its pid to FILE")
    parser.add_argument("-p", "--process", type=Path, metavar="FILE", help="a process object as in config.json")
    parser.add_argument("id", help="the container")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program and its arguments")


def run(args: argparse.Namespace) -> int:
    from runtime import container
    from runtime.state import Store

    return container.run_process(
        Store(args.root), args.id, lambda state: _process(args, state), detach=args.detach, pid_file=args.pid_file
    )  # fmt: skip


def _process(args: argparse.Namespace, state: Any) -> Any:
    """The program to run: from --process, or the container's own process object with what was given instead."""
    from migrate.errors import UsageError
    from runtime.errors import SpecError
    from runtime.fields import Fields
    from runtime.spec import load, parse_process

    if args.process is not None:
        try:
            return parse_process(Fields(json.loads(args.process.read_bytes()), str(args.process)))
        except (OSError, ValueError) as error:
            raise SpecError(f"{args.process}: cannot be read: {error}") from None
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("no program to run", remedy="pymigrate exec ID CMD [ARG...]")
    process = load(Path(state.bundle)).process
    for entry in args.env:
        if "=" not in entry[1:]:
            raise UsageError(f"--env {entry}: must be NAME=VALUE")
    changes: dict[str, Any] = {"args": tuple(command), "env": (*process.env, *args.env), "terminal": False}
    if args.cwd is not None:
        changes["cwd"] = args.cwd
    if args.user is not None:
        uid, _, gid = args.user.partition(":")
        if not uid.isdigit() or (gid and not gid.isdigit()):
            raise UsageError(f"--user {args.user}: must be UID or UID:GID, in numbers")
        changes |= {"uid": int(uid), "gid": int(gid or process.gid)}
    return dataclasses.replace(process, **changes)
