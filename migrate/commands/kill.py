"""pymigrate kill ID [SIGNAL]: send a signal to a container."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Send a signal, by name or number (default SIGTERM), to a container's init.",
    (Flag("all", "send the signal to every process of the container", short="a"),),
    ("id", "signal?"),
)


def parse_signal(text: str) -> int:
    """Return a signal's number: KILL, SIGKILL and 9 are the same, 0 only checks for the process. Raises UsageError."""
    from migrate.errors import UsageError

    if text.isdecimal() and len(text) < 3 and int(text) < 65:
        return int(text)
    import signal

    try:
        return int(signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"])
    except KeyError:
        raise UsageError(f"unknown signal {text!r}", remedy="`kill -l` lists the names") from None


def run(args: Values) -> int:
    from runtime.lifecycle import control
    from runtime.state.store import Store

    control.kill(Store(args.root), args.id, parse_signal(args.signal or "TERM"), everyone=args.all)
    return 0
