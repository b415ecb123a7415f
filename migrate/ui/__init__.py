"""Monitors: how the events of a move are shown on a terminal, in a log, and to a program."""

import sys

from migrate.events import Monitor


def monitor(*, as_json: bool, several: bool = False) -> Monitor:
    """Return a monitor: JSON lines if asked for, a live display on a terminal, plain lines otherwise.

    `several`: lines name the container, because several are moved.
    """
    if as_json:
        from migrate.ui.lines import JsonLines

        return JsonLines(sys.stdout)
    if sys.stdout.isatty():
        from migrate.ui.live import Live

        return Live(several=several)
    from migrate.ui.lines import PlainLines

    return PlainLines(sys.stdout, several=several)
