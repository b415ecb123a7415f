"""A channel of the SSH connection to a target."""

import contextlib
from collections.abc import Iterator

import paramiko

from migrate.limits import CALL_TIMEOUT
from migrate.wire import bulk

STDERR_LIMIT = 16 << 20  # bytes that are looked at


class Channel:
    """A command at the target, with its stdin and stdout as a byte stream (as rsync needs it)."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def sendall(self, data: bytes) -> None:
        with lost_as_os_error():
            bulk.send(self._channel, data)

    def recv(self, size: int) -> bytes:
        return self._channel.recv(size)

    def shutdown_write(self) -> None:
        with lost_as_os_error():
            self._channel.shutdown_write()

    def exit_status(self, timeout: float = CALL_TIMEOUT) -> int | None:
        """Return the command's exit status, -1 if a signal has killed it.

        Returns None if the status does not arrive within `timeout` seconds, or the connection is lost.
        """
        if not self._channel.status_event.wait(timeout):
            return None
        status = self._channel.recv_exit_status()
        return None if status == -1 and not is_connected(self._channel) else status

    def errors(self) -> str:
        """Return the last 8 KiB of the command's stderr after its exit."""
        text, left = b"", STDERR_LIMIT
        self._channel.settimeout(CALL_TIMEOUT)
        with contextlib.suppress(TimeoutError, OSError):
            while left > 0 and (data := self._channel.recv_stderr(8192)):
                text = (text + data)[-8192:]
                left -= len(data)
        return text.decode(errors="replace")

    def close(self) -> None:
        self._channel.close()


@contextlib.contextmanager
def lost_as_os_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, paramiko.SSHException) as error:  # the errors of a closed paramiko transport
        raise ConnectionError(str(error) or "the connection was closed") from None


def is_connected(channel: paramiko.Channel) -> bool:
    transport = channel.get_transport()
    return transport is not None and transport.is_active()


def last_line(channel: paramiko.Channel) -> str:
    channel.settimeout(1.0)
    with contextlib.suppress(TimeoutError, OSError):
        return line((channel.recv_stderr(8192).decode(errors="replace").strip().splitlines() or [""])[-1])
    return ""


def line(value: object) -> str:
    """Return text from the other host as one printable line of bounded length."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:2000]
