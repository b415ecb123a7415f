"""The C parts of `signal` and `socket`, without the enumerations around them, which cost every verb 5 ms."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as signals
    import socket as sockets
else:
    import _signal as signals
    import _socket as sockets

__all__ = ["signals", "sockets"]
