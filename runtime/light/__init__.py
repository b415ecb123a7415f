"""Give the C parts of `signal` and `socket`, without the enumerations around them, which cost every verb 5 ms."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as signals
    import socket as sockets

else:
    import _signal as signals

    def __getattr__(name):
        """Import sockets at their first use, because most short verbs open none."""
        if name != "sockets":
            raise AttributeError(name)
        import _socket

        return _socket


__all__ = ["signals", "sockets"]
