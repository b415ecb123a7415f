"""pymigrate ps ID [OPTION...]: list the processes of a container by their pids on this host."""

from __future__ import annotations

from migrate.cli.flags import Syntax
from migrate.commands.list import FORMAT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "List the processes of a container. The options are those of ps(1); the default is -ef.",
    (FORMAT,),
    ("id", "ps_options..."),
)


def run(args: Values) -> int:
    from runtime.cgroups.cgroup import Cgroup
    from runtime.light import json as light_json
    from runtime.state.store import Store

    pids = Cgroup.of(Store(args.root).load(args.id)).pids()
    if args.format == "json" or args.json:
        print(light_json.dumps(pids))
        return 0
    lines = _ps(args.ps_options or ["-ef"])
    column = lines[0].split().index("PID") if lines and "PID" in lines[0].split() else None
    if column is None:
        from migrate.errors import UsageError

        raise UsageError(f"ps {' '.join(args.ps_options)}: the output has no column PID")
    print(lines[0])
    wanted = {str(pid) for pid in pids}
    for line in lines[1:]:
        fields = line.split(None, column + 1)
        if len(fields) > column and fields[column] in wanted:
            print(line)
    return 0


def _ps(options: list[str]) -> list[str]:
    import subprocess

    from migrate.errors import MigrateError

    try:
        done = subprocess.run(["ps", *options], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise MigrateError("ps is not installed", remedy="apt-get install procps, or use --format json") from None
    if done.returncode:
        raise MigrateError(f"ps {' '.join(options)}: {done.stderr.strip()[:200]}")
    return done.stdout.splitlines()
