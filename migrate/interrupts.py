"""Protect code from Ctrl-C, SIGTERM and `pymigrate cancel`."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CANCEL = signal.SIGUSR1  # `pymigrate cancel` sends it: see journal/under_way.py
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, CANCEL)


@contextmanager
def uninterruptible() -> Iterator[None]:
    """Ignore these signals inside. The code inside must have its own deadlines."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
