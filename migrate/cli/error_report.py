"""Report errors and warnings where the user asked for them: in a log file, as JSON on stdout, or as lines on stderr."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from criu_rpc.errors import Error
from migrate.errors import Blocked
from runtime.light import json as light_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.cli.flags import Values


LONGEST = 1000  # characters of one line
_TAIL = 300


def printable(text: str) -> str:
    """Return one line that is safe to print: escape what is not printable, and cut the middle out of a long line.

    Messages quote text from a config.json, a container or another host.
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    if len(text) > LONGEST:
        left_out = f" [{len(text) - LONGEST} characters] "
        text = text[: LONGEST - _TAIL] + left_out + text[-_TAIL:]
    return text


def _sentence(error: Exception) -> str:
    """Return an error's message; for a system error the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        named = [str(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        return f"{' and '.join(named)}: {error.strerror}" if named else error.strerror
    return str(error) or type(error).__name__


def warn(text: str, glob: Values) -> None:
    """Show a warning on stderr, and in the log that engines read."""
    text = printable(text)
    print(f"pymigrate: warning: {text}", file=sys.stderr, flush=True)
    if glob.log:
        _write_log(glob, "warning", text, [f"pymigrate: warning: {text}"])


def _write_log(glob: Values, level: str, message: str, lines: list[str]) -> str | None:
    """Append to --log. Return the reason if that failed, otherwise None."""
    entry = "\n".join(lines)
    if glob.log_format == "json":  # engines show `msg` of the last entry of level "error"
        entry = light_json.dumps({"level": level, "msg": message, "time": datetime.now(UTC).isoformat()})
    try:
        with open(glob.log, "a", errors="backslashreplace") as out:
            out.write(entry + "\n")
    except (OSError, ValueError) as problem:
        return getattr(problem, "strerror", None) or str(problem)
    return None


def report(error: Exception, glob: Values) -> str:
    """Show an error. Return its kind, the key into the table of exit codes."""
    kind = error.kind if isinstance(error, Error) else Error.kind
    message = printable(_sentence(error))
    remedy = "\n".join(map(printable, ((isinstance(error, Error) and error.remedy) or "").splitlines()))
    lines = [f"pymigrate: error: {message}"]
    lines += [f"  {line}" for line in remedy.splitlines()]
    problems = []
    if isinstance(error, Blocked):
        problems = [tuple(map(printable, problem)) for problem in error.problems]
        for rule, where, problem, what_to_do in problems:
            lines += [f"  {rule}: {where}: {problem}", f"    {what_to_do}"]
    if glob.log:
        failed = _write_log(glob, "error", message, lines)
        if failed is not None:
            lines.append(printable(f"  --log {glob.log}: {failed}"))
    if glob.json:
        event: dict[str, Any] = {"event": "error"}
        event |= (isinstance(error, Error) and error.move) or {}
        event |= {"kind": kind, "message": message}
        event |= {"remedy": remedy} if remedy else {}
        event |= {"workload": error.workload} if isinstance(error, Error) and error.workload else {}
        if isinstance(error, Blocked):
            names = ("rule", "where", "problem", "remedy")
            event["blockers"] = [dict(zip(names, problem, strict=True)) for problem in problems]
        print(light_json.dumps(event), flush=True)
    else:
        print("\n".join(lines), file=sys.stderr, flush=True)
    return kind
