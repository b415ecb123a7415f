"""pymigrate exec ID CMD [ARG...]: run a program in a running container, with the caller's standard streams."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax
from migrate.commands import create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.cli.flags import Values
    from runtime.spec.config import Spec
    from runtime.spec.process import Process
    from runtime.state.record import State

FLAGS = (
    Flag("env", "set an environment variable (repeatable)", "list", short="e", metavar="NAME=VALUE"),
    Flag("cwd", "working directory in the container", "str", metavar="DIR"),
    Flag("user", "run as this user", "str", short="u", metavar="UID[:GID]"),
    Flag("additional-gids", "additional group (repeatable)", "list", short="g", metavar="GID"),
    Flag("tty", "give the program a terminal", short="t"),
    Flag(
        "detach",
        "return once it runs; it becomes a child of init, writes to the log, moves along",
        short="d",
    ),
    Flag("process", "a file with a process object as in config.json", "str", short="p", metavar="FILE"),
    Flag("pid-file", "write the program's pid to FILE", "str", metavar="FILE"),
    Flag("console-socket", "send the master of the terminal to this Unix socket", "str", metavar="PATH"),
    Flag("pidfd-socket", "send a pidfd of the program to this Unix socket", "str", metavar="PATH"),
    Flag("preserve-fds", "pass N more descriptors, from 3 on, to the program", "int", metavar="N", default=0),
    Flag("cap", "additional capability (repeatable)", "list", short="c", metavar="CAP_NAME"),
    Flag("no-new-privs", "forbid gaining privileges"),
    Flag("apparmor", "AppArmor profile", "str", metavar="PROFILE"),
    Flag("process-label", "SELinux label", "str", metavar="LABEL"),
    Flag("cgroup", "run in this cgroup below the container's (repeatable)", "list", metavar="[CONTROLLER,...:]PATH"),
    Flag("ignore-paused", "accept a paused container; the program starts when it is resumed"),
    Flag("no-subreaper", "accepted for compatibility with runc and ignored"),
)
# The settings that a program takes from its container if --process does not set them.
_INHERITED = ("capabilities", "apparmor_profile", "selinux_label", "rlimits", "oom_score_adj", "umask")
FAILED = 255  # as runc: smaller numbers are exit statuses of the program
SYNTAX = Syntax(
    "Run a program in a running container, with the caller's stdin, stdout and stderr.", FLAGS, ("id", "command...")
)


def run(args: Values) -> int:
    from runtime.lifecycle import exec as execution
    from runtime.state.store import Store

    create.require_open(args.preserve_fds)
    names = ("detach", "pid_file", "console_socket", "pidfd_socket", "preserve_fds", "ignore_paused")
    options = execution.Options(**{name: args.__dict__[name] for name in names}, cgroups=tuple(args.cgroup))
    return execution.run(Store(args.root), args.id, lambda state: _process(args, state), options)


def _process(args: Values, state: State) -> tuple[Process, Spec]:
    """Return the program to run: that of --process, or the container's with the flags applied. Raises UsageError."""
    from migrate.errors import UsageError
    from runtime.linux.capabilities import NUMBERS, SETS
    from runtime.spec.config import read_json
    from runtime.spec.fields import Fields
    from runtime.spec.process import parse_process
    from runtime.state.kept_config import load_kept

    spec = load_kept(state)
    if args.process is not None:
        process = parse_process(Fields(read_json(args.process, ""), args.process))
        own = {name: getattr(spec.process, name) for name in _INHERITED if not _says(getattr(process, name))}
        return process.replace(**own, terminal=process.terminal or args.tty), spec
    if not args.command:
        raise UsageError("no program to run", remedy="pymigrate exec ID CMD [ARG...]")
    for entry in args.env:
        if "=" not in entry[1:]:
            raise UsageError(f"--env {entry}: must be NAME=VALUE")
    process = spec.process
    names = {entry.partition("=")[0] for entry in args.env}
    env = (*(entry for entry in process.env if entry.partition("=")[0] not in names), *args.env)
    changes: dict[str, Any] = {"args": tuple(args.command), "env": env, "terminal": args.tty, "console_size": None}
    if args.cwd is not None:
        changes["cwd"] = args.cwd
    if args.user is not None:
        uid, _, gid = args.user.partition(":")
        if not _is_id(uid) or (gid and not _is_id(gid)):
            raise UsageError(f"--user {args.user}: must be UID or UID:GID, in numbers")
        changes |= {"uid": int(uid), "gid": int(gid or process.gid)}
    if args.additional_gids:
        if not all(map(_is_id, args.additional_gids)):
            raise UsageError("--additional-gids: must be numbers")
        changes["additional_gids"] = (*process.additional_gids, *map(int, args.additional_gids))
    if args.cap:
        for name in args.cap:
            if name not in NUMBERS:
                raise UsageError(f"--cap {name}: unknown capability")
        sets = process.capabilities or {}
        raised = ("bounding", "effective", "permitted")
        changes["capabilities"] = {
            kind: sets.get(kind, frozenset()) | frozenset(args.cap if kind in raised else ()) for kind in SETS
        }
    if args.no_new_privs:
        changes["no_new_privileges"] = True
    changes |= {"apparmor_profile": args.apparmor} if args.apparmor else {}
    changes |= {"selinux_label": args.process_label} if args.process_label else {}
    return process.replace(**changes), spec


def _says(value: object) -> bool:
    return value is not None and value not in ("", ())


def _is_id(text: str) -> bool:
    from runtime.spec.process import ID_MAX

    return text.isdecimal() and len(text) < 11 and int(text) <= ID_MAX
