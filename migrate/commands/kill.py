"""pymigrate kill ID [SIGNAL]: send a signal to a container."""

import argparse
import signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("signal", nargs="?", default="SIGTERM", help="name or number (default SIGTERM)")
    parser.add_argument("-a", "--all", action="store_true", help="send it to every process of the container")


def parse_signal(text: str) -> signal.Signals:
    """KILL, SIGKILL and 9 are the same. Raises UsageError."""
    from migrate.errors import UsageError

    try:
        return signal.Signals(int(text)) if text.isdigit() else signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise UsageError(f"unknown signal {text!r}", remedy="`kill -l` lists the names") from None


def run(args: argparse.Namespace) -> int:
    from runtime import container
    from runtime.state import Store

    container.kill(Store(args.root), args.id, parse_signal(args.signal), everyone=args.all)
    return 0
