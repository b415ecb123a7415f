"""More connections that carry memory, beside the one of the agent (`move --streams`).

sshd takes at most 2 MiB for each channel and round trip, and encrypts a connection on one processor. Each stream is a
connection of its own. Its command at the target (migrate/target/stream.py) hands its input to the agent of the move.
"""

import contextlib
import shlex
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import paramiko

from criu_rpc.errors import Error
from migrate.errors import DeadlineExceeded, HostError
from migrate.limits import SEND_TIMEOUT, STREAM_OPEN_TIMEOUT
from migrate.wire import bulk, frames, ssh
from migrate.wire.frames import FrameType
from migrate.wire.native import Buffer

_REMEDY = "--streams 1, or let sshd there accept more connections at once (MaxStartups in sshd_config)"


class Stream:
    """One connection, which only sends."""

    def __init__(self, host: str, client: paramiko.SSHClient, channel: paramiko.Channel) -> None:
        self._host, self._client, self._channel = host, client, channel
        self.bytes_sent = 0

    @classmethod
    def open(cls, host: str, command: str) -> Self:
        """Log in to `host`, and run `command` there. Raises HostError."""
        client = ssh.login(host)
        try:
            transport = client.get_transport()
            if transport is None:
                raise EOFError("the connection was lost")
            channel = transport.open_session(timeout=STREAM_OPEN_TIMEOUT)
            channel.exec_command(command)
            channel.settimeout(SEND_TIMEOUT)
        except (paramiko.SSHException, EOFError, OSError) as error:
            client.close()
            raise HostError(f"{host}: the channel is refused: {error or type(error).__name__}") from None
        return cls(host, client, channel)

    def send(self, payload: tuple[Buffer, ...]) -> None:
        """Send the parts of one payload with a piece of the container's memory (codec.py).

        Raises HostError, DeadlineExceeded.
        """
        size = sum(map(len, payload))
        try:
            bulk.send(self._channel, frames.header(FrameType.MEMORY, size), *payload)
            self.bytes_sent += size
        except TimeoutError:
            raise DeadlineExceeded(f"{self._host}: the host takes no data") from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise HostError(f"{self._host}: the connection of a stream was lost: {error}") from None

    def close(self) -> None:
        with contextlib.suppress(Exception):  # as in Peer.close
            self._client.close()


def open_all(host: str, count: int, command: list[str]) -> list[Stream]:
    """Open streams 1 to `count` at once; `command` is MemoryReady.stream. Raises HostError: all are closed then."""

    def open_one(number: int) -> Stream | Error:
        try:
            return Stream.open(host, f"exec {shlex.join([*command, str(number)])}")
        except Error as error:
            return error

    with ThreadPoolExecutor(count, "streams") as pool:
        results = list(pool.map(open_one, range(1, count + 1)))
    opened = [result for result in results if isinstance(result, Stream)]
    for number, result in enumerate(results, start=2):
        if isinstance(result, Error):
            close_all(opened)
            problem = str(result).removeprefix(f"{host}: ")
            raise HostError(f"{host}: stream {number} of {count + 1} cannot be opened: {problem}", remedy=_REMEDY)
    return opened


def close_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()
