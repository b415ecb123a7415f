"""The command line: one static table of verbs. A verb's module is imported only when that verb is called.

The verbs of the runtime follow runc's command line (cli/flags.py) and import next to nothing, because engines call them
several times for each container. The other verbs use argparse (cli/arguments.py).
"""

from __future__ import annotations

import gc
import os
import sys

from criu_rpc.errors import Error
from migrate import __version__
from migrate.cli.flags import Flag, Values, parse, scan, usage, usage_error
from runtime import notices
from runtime.light import signals
from runtime.paths import DEFAULT_ROOT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

VERBS: dict[str, str] = {
    "move": "move a running container to another host",
    "validate": "list every reason why a container cannot move",
    "snapshot": "save, show or restore a snapshot of a running container",
    "recover": "finish a move whose outcome is unknown, or repair a container after an interrupted dump",
    "cancel": "cancel a move that is under way: the container stays here",
    "migrations": "list the moves that this host took part in; --clean removes what they left behind",
    "demo": "move a Redis server to another host and back, and check that nothing is lost",
    "lab": "make hosts on this machine to try moves between",
    "create": "create a container from a bundle",
    "start": "start a created container",
    "run": "create and start a container",
    "exec": "run a program in a running container",
    "kill": "send a signal to a container",
    "delete": "delete a container",
    "state": "print the state of a container",
    "list": "list the containers of this host",
    "ps": "list the processes of a container",
    "pause": "freeze all processes of a container",
    "resume": "resume a paused container",
    "update": "change the limits of a container",
    "events": "print the events and resource use of a container",
    "checkpoint": "save a running container to image files",
    "restore": "restore a container from image files",
    "attach": "connect to the terminal or the output of a detached container",
    "logs": "print what a container wrote to stdout and stderr",
    "spec": "write a config.json whose container can be moved",
    "features": "print the features of this runtime, as JSON",
}
# The others are OCI verbs.
_WITH_ARGPARSE = frozenset(("move", "validate", "snapshot", "recover", "cancel", "migrations", "demo", "lab", "logs"))

_GLOBAL = (
    Flag("root", f"state directory (default for root: {DEFAULT_ROOT})", "str", metavar="DIR"),
    Flag("log", "also append errors to FILE", "str", metavar="FILE"),
    Flag("log-format", "format of that file: `text` or `json`", "str", default="text", choices=("text", "json")),
    Flag("systemd-cgroup", "have systemd make the cgroups; cgroupsPath is then slice:prefix:name"),
    Flag("debug", "show tracebacks and CRIU's full log tail"),
    Flag("json", "machine-readable output, one JSON object per line"),
    Flag("version", "show the version", short="v"),
    Flag("cgroup-manager", "`disabled`, `cgroupfs` or `systemd`, as conmon passes it", "str",
         choices=("disabled", "cgroupfs", "systemd")),
    Flag("rootless", "accepted for compatibility with runc and ignored, because it is detected", "str"),
    Flag("criu", "accepted for compatibility with runc and ignored; see $PYMIGRATE_CRIU", "str"),
)  # fmt: skip


def _help() -> str:
    from migrate.cli.exit_codes import EXIT_CODES

    width = max(map(len, VERBS))
    lines = ["usage: pymigrate [options] VERB ...", ""]
    lines += ["Move running containers between Linux hosts, or snapshot them, with CRIU.", "", "options:"]
    for flag in _GLOBAL:
        left = f"-{flag.short}, --{flag.name}" if flag.short else f"--{flag.name}"
        left += "" if flag.kind == "bool" else f" {flag.metavar}"
        lines.append(f"  {left:<26}  {flag.help}")
    lines += ["", "verbs:", *(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())]
    lines += ["", "exit codes:", *(f"  {code:>3}  {text}" for code, text in EXIT_CODES.values())]
    return "\n".join([*lines, "", "See `pymigrate VERB --help` for the options of a verb."])


def _default_root() -> str:
    """Return the default state directory: for users other than root one in $XDG_RUNTIME_DIR."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    return f"{runtime_dir}/pymigrate" if os.geteuid() and runtime_dir else DEFAULT_ROOT


def _run(argv: list[str], glob: Values) -> int:
    """Run the verb of a command line. Store the global options in `glob`, where the error report reads them."""
    found, rest = scan(argv, _GLOBAL, "pymigrate", stop=True)
    glob.__dict__.update(found.__dict__)
    glob.root = os.path.abspath(found.root or _default_root())  # monitors have another working directory
    glob.systemd_cgroup = found.systemd_cgroup or found.cgroup_manager == "systemd"
    if found.version:
        from runtime.state.record import OCI_VERSION

        print(f"pymigrate version {__version__}\nspec: {OCI_VERSION}")
        return 0
    if rest[:1] == ["help"] and len(rest) > 1:
        rest = [rest[1], "--help"]
    if found.help or rest[:1] == ["help"]:
        print(_help())
        return 0
    if not rest:
        raise usage_error("no verb", "pymigrate")
    verb = rest[0]
    if verb not in VERBS:
        raise usage_error(f"unknown verb {verb!r}", "pymigrate")
    command: Any = __import__(f"migrate.commands.{verb}", fromlist=["run"])
    program = f"pymigrate {verb}"
    glob.failed = getattr(command, "FAILED", 0)  # the exit status after any error, where the verb has only one
    if verb in _WITH_ARGPARSE:
        from migrate.cli import arguments

        gc.enable()

        args: Any = arguments.parse(command, program, VERBS[verb], rest[1:], glob)
    else:
        args = parse(rest[1:], command.SYNTAX, program)
        if args.help:
            print(usage(command.SYNTAX, program))
            return 0
        args.__dict__.update({name: value for name, value in glob.__dict__.items() if name not in args.__dict__})
    code: int = command.run(args)
    return code


def _interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
    """Unwind through every `finally`; ignore further signals, because they must not interrupt the clean-up."""
    for number in (signals.SIGINT, signals.SIGTERM, signals.SIGHUP):
        signals.signal(number, signals.SIG_IGN)
    from migrate.errors import Interrupted

    names = {int(signals.SIGINT): "SIGINT", int(signals.SIGTERM): "SIGTERM", int(signals.SIGHUP): "SIGHUP"}
    raise Interrupted(f"interrupted by {names[signum]}")


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code. Report an error as one message, with a traceback only under --debug."""
    argv = sys.argv[1:] if argv is None else argv
    if "PATH" in os.environ:  # never run a program from the working directory
        os.environ["PATH"] = ":".join(place for place in os.environ["PATH"].split(":") if place.startswith("/"))
    os.umask(os.umask(0o022) | 0o022)  # services often have umask 0, and directories are made with their parents
    for number in (signals.SIGINT, signals.SIGTERM, signals.SIGHUP):
        signals.signal(number, _interrupt)
    glob = Values(log=None, log_format="text", json="--json" in argv, failed=0)
    notices.show = lambda text: _warn(text, glob)
    try:
        return _run(argv, glob)
    except BrokenPipeError:
        return 1
    except Exception as error:
        from migrate.cli.error_report import report
        from migrate.cli.exit_codes import exit_code

        code = exit_code(report(_explain(error, debug="--debug" in argv), glob))
        return glob.failed or code


def _warn(text: str, glob: Values) -> None:
    from migrate.cli.error_report import warn

    warn(text, glob)


def _explain(error: Exception, *, debug: bool) -> Exception:
    """Return the error to show to the user."""
    from migrate.errors import MigrateError, UsageError

    if debug and not isinstance(error, UsageError):
        import traceback

        traceback.print_exc()
    if isinstance(error, ModuleNotFoundError):
        return MigrateError(
            f"the Python module {error.name} is not installed",
            remedy="install pymigrate on this host: vagrant/provision.sh",
        )
    if not debug and not isinstance(error, Error) and not isinstance(error, OSError):
        return MigrateError(f"internal error: {type(error).__name__}: {error} (run with --debug for details)")
    return error


def entry() -> NoReturn:
    """Run the command for the launcher, without garbage collection and interpreter shutdown, which cost time."""
    gc.disable()
    code = main()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed when the command was started
                stream.flush()
    except OSError:
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
