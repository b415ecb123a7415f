"""Saying what went wrong where the user asked for it: a log file, JSON on stdout, or plain lines on stderr."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from migrate.errors import Blocked
from runtime import jsonio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.flags import Values


def report(error: Exception, glob: Values) -> str:
    """Show an error; returns its kind, the key into the table of exit codes."""
    kind: str = getattr(error, "kind", "failure")
    message, remedy = str(error) or type(error).__name__, getattr(error, "remedy", None)
    lines = [f"pymigrate: error: {message}"]
    lines += [f"  {line}" for line in (remedy or "").splitlines()]
    if isinstance(error, Blocked):
        for rule, where, problem, what_to_do in error.problems:
            lines += [f"  {rule}: {where}: {problem}", f"    {what_to_do}"]
    if glob.log:
        entry = "\n".join(lines)
        if glob.log_format == "json":  # engines show `msg` of the last entry
            entry = jsonio.dumps({"level": "error", "msg": message, "time": datetime.now(UTC).isoformat()})
        try:
            with open(glob.log, "a") as out:
                out.write(entry + "\n")
        except OSError as problem:
            lines.append(f"  --log {glob.log}: {problem.strerror}")
    if glob.json:
        event: dict[str, Any] = {"event": "error", "kind": kind, "message": message}
        event |= {"remedy": remedy} if remedy else {}
        event |= {"workload": error.workload} if hasattr(error, "workload") else {}
        if isinstance(error, Blocked):
            names = ("rule", "where", "problem", "remedy")
            event["blockers"] = [dict(zip(names, problem, strict=True)) for problem in error.problems]
        print(jsonio.dumps(event), flush=True)
    else:
        print("\n".join(lines), file=sys.stderr, flush=True)
    return kind
