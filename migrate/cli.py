"""The command line: one static table of verbs; a verb's module is imported only when it is called."""

import argparse
import importlib
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from migrate import __version__
from migrate.errors import Blocked, Interrupted, MigrateError, UsageError
from migrate.exits import EXIT_CODES, exit_code

DEFAULT_ROOT = Path("/run/opencontainer/containers")

VERBS: dict[str, tuple[str, str]] = {
    "move": ("migrate.commands.move", "move a running container to another host"),
    "validate": ("migrate.commands.validate", "list every reason why a container cannot move"),
    "snapshot": ("migrate.commands.snapshot", "save, show or restore a snapshot of a running container"),
    "recover": ("migrate.commands.recover", "finish a move whose end is not known"),
    "migrations": ("migrate.commands.migrations", "list the moves that this host has taken part in"),
    "demo": ("migrate.commands.demo", "move a Redis to another host and back, and check that nothing is lost"),
    "lab": ("migrate.commands.lab", "hosts on this machine to try moves between"),
    "create": ("migrate.commands.create", "create a container from a bundle"),
    "start": ("migrate.commands.start", "start a created container"),
    "run": ("migrate.commands.run", "create and start a container"),
    "exec": ("migrate.commands.exec", "run a program in a running container"),
    "kill": ("migrate.commands.kill", "send a signal to a container"),
    "delete": ("migrate.commands.delete", "delete a container"),
    "state": ("migrate.commands.state", "print the state of a container"),
    "list": ("migrate.commands.list", "list the containers of this host"),
    "logs": ("migrate.commands.logs", "print what a container wrote to stdout and stderr"),
    "spec": ("migrate.commands.spec", "write a config.json that can be moved"),
}


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as one line through the same path as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def _epilog() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    exits = "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.values())
    return f"verbs:\n{verbs}\n\nexit codes:\n{exits}\n\n`pymigrate VERB --help` says more."


def _global_parser() -> _Parser:
    parser = _Parser(
        prog="pymigrate",
        description="Move running containers between Linux hosts, or snapshot them, with CRIU.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pymigrate {__version__}")
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, metavar="DIR", help="state directory")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and CRIU's full log tail")
    parser.add_argument("--json", action="store_true", help="machine-readable output, one JSON object per line")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append errors to FILE instead of stderr")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("verb", metavar="VERB", choices=tuple(VERBS), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """Arguments of the verb with the global options merged in, and the name of the verb's module."""
    glob = _global_parser().parse_args(argv)
    module, text = VERBS[glob.verb]
    command = importlib.import_module(module)
    parser = _Parser(prog=f"pymigrate {glob.verb}", description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", default=glob.debug, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", default=glob.json, help=argparse.SUPPRESS)
    command.add_arguments(parser)
    args = parser.parse_args(glob.rest)
    args.root, args.log, args.log_format = glob.root, glob.log, glob.log_format
    return args, module


def _interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
    """The first signal unwinds through every `finally`; further ones must not cut the cleaning up short."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted(f"interrupted by {signal.Signals(signum).name}")


def report_error(error: BaseException, *, log: Path | None, log_format: str, as_json: bool) -> None:
    """Write one error where the user asked for it: a log file, JSON on stdout, or plain lines on stderr."""
    message, remedy = str(error) or type(error).__name__, getattr(error, "remedy", None)
    if as_json or log_format == "json":
        import json
        from datetime import UTC, datetime

        if log is not None:
            entry = {"level": "error", "msg": message, "time": datetime.now(UTC).isoformat()}
            with log.open("a") as out:
                out.write(json.dumps(entry) + "\n")
        if as_json:
            event: dict[str, object] = {"event": "error", "kind": getattr(error, "kind", "failure"), "message": message}
            event |= {"remedy": remedy} if remedy else {}
            event |= {"workload": error.workload} if hasattr(error, "workload") else {}
            if isinstance(error, Blocked):
                names = ("rule", "where", "problem", "remedy")
                event["blockers"] = [dict(zip(names, problem, strict=True)) for problem in error.problems]
            print(json.dumps(event), flush=True)
            return
    lines = [f"pymigrate: error: {message}"]
    lines += [f"  {line}" for line in (remedy or "").splitlines()]
    if isinstance(error, Blocked):
        for rule, where, problem, what_to_do in error.problems:
            lines += [f"  {rule}: {where}: {problem}", f"    {what_to_do}"]
    if log is not None and log_format == "text":
        with log.open("a") as out:
            out.write("\n".join(lines) + "\n")
    print("\n".join(lines), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns its exit code. Every error is one message; a traceback only with --debug."""
    argv = sys.argv[1:] if argv is None else argv
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    args: argparse.Namespace | None = None
    try:
        args, module = parse(argv)
        code: int = importlib.import_module(module).run(args)
        return code
    except BrokenPipeError:
        return 1
    except Exception as error:
        if "--debug" in argv and not isinstance(error, UsageError):
            import traceback

            traceback.print_exc()
        elif isinstance(error, ModuleNotFoundError):
            error = MigrateError(
                f"this needs the Python module {error.name}, which is not installed",
                remedy="install pymigrate on this host: vagrant/provision.sh",
            )
        elif not hasattr(error, "kind") and not isinstance(error, OSError):
            error = type(error)(f"internal error: {type(error).__name__}: {error} (run with --debug for details)")
        report_error(
            error,
            log=args.log if args else None,
            log_format=args.log_format if args else "text",
            as_json=args.json if args else "--json" in argv,
        )
        return exit_code(getattr(error, "kind", "failure"))


if __name__ == "__main__":
    sys.exit(main())
