"""Call systemd's manager (org.freedesktop.systemd1(5)) over its private socket or the system bus.

The messages are jeepney's. Authentication and the loop that receives messages are not, because jeepney's blocking
connection always says Hello: systemd 252 resets a connection to its private socket that does. A subclass without Hello
works, but saves only 10 of 150 lines, depends on private names of jeepney, takes 1.5 ms more to import, and 18 ms
instead of 11 ms to start and stop a unit (20 units, by turns): it reads systemd's many signals 4 KiB at a time.
"""

from __future__ import annotations

import os
import socket
import time

from runtime.errors import ContainerError, DeadlineExceeded
from runtime.limits import SYSTEMD_TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Any, Self

_BOOTED = "/run/systemd/system"  # sd_booted(3)
_PRIVATE, _SYSTEM_BUS = "/run/systemd/private", "/run/dbus/system_bus_socket"
_NAME, _PATH, _MANAGER = "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"


class Refused(Exception):
    """systemd answered with an error; `name` is the last part of its D-Bus name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name.rpartition(".")[2]


class Systemd:
    """A connection to systemd. Everything done with it must be done within SYSTEMD_TIMEOUT."""

    def __init__(self) -> None:
        """Raises ContainerError when systemd does not run, or cannot be reached."""
        if not os.path.isdir(_BOOTED):
            raise ContainerError(
                "systemd does not run on this host", remedy="omit --systemd-cgroup: cgroups are made directly then"
            )
        try:
            from jeepney.low_level import Parser
        except ImportError:
            raise ContainerError(
                "the Python module jeepney is missing, which speaks to systemd", remedy="pip install jeepney"
            ) from None
        self._deadline = time.monotonic() + SYSTEMD_TIMEOUT
        self._parser: Any = Parser()
        self._serial = 0
        self._jobs: dict[str, str] = {}
        self._socket = self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._socket.close()

    def _connect(self) -> socket.socket:
        """Root uses the private socket, which works without a bus and delivers all signals without a subscription."""
        problems = []
        for path in (_PRIVATE, _SYSTEM_BUS):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(SYSTEMD_TIMEOUT)
                sock.connect(path)
                self._authenticate(sock)
                self._socket = sock
                if path == _SYSTEM_BUS:
                    self._join_bus()
                return sock
            except (OSError, Refused) as error:
                sock.close()
                problems.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        raise ContainerError(f"systemd cannot be reached: {'; '.join(problems)}")

    def _authenticate(self, sock: socket.socket) -> None:
        """Authenticate with SASL EXTERNAL: the kernel reports our user id. After the accepting line come messages.

        BEGIN is sent together with the rest, as sd-bus does. systemd would not see a message that arrives together with
        BEGIN until another one arrives.
        """
        sock.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
        line = b""
        while not line.endswith(b"\r\n"):
            byte = sock.recv(1)
            if not byte:
                raise ConnectionError("the connection was closed")
            line += byte
        if not line.startswith(b"OK "):
            raise ConnectionError(f"refused: {line.decode(errors='replace').strip()}")

    def _join_bus(self) -> None:
        bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
        self._call(bus, "Hello", "", ())
        rule = f"type='signal',sender='{_NAME}',interface='{_MANAGER}',member='JobRemoved'"
        self._call(bus, "AddMatch", "s", (rule,))
        self.call("Subscribe", "", ())

    def call(self, method: str, signature: str, body: Sequence[Any]) -> Any:
        """Call a method of the manager and return its answer. Raises Refused, ContainerError, DeadlineExceeded."""
        return self._call((_NAME, _PATH, _MANAGER), method, signature, body)

    def _call(self, target: tuple[str, str, str], method: str, signature: str, body: Sequence[Any]) -> Any:
        from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call

        name, path, interface = target
        address = DBusAddress(path, bus_name=name, interface=interface)
        self._serial += 1
        message = new_method_call(address, method, signature or None, tuple(body))
        try:
            self._socket.sendall(message.serialise(serial=self._serial))
        except OSError as error:
            raise ContainerError(f"systemd: {error.strerror or error}") from None
        while True:
            answer = self._receive()
            if answer.header.fields.get(HeaderFields.reply_serial) != self._serial:
                continue
            if answer.header.message_type is MessageType.error:
                said = answer.body[0] if answer.body else "no reason given"
                raise Refused(answer.header.fields[HeaderFields.error_name], str(said))
            return answer.body

    def wait(self, job: str) -> str:
        """Wait for the end of a job; return its result, "done" for success. Raises ContainerError, DeadlineExceeded."""
        while job not in self._jobs:
            self._receive()
        return self._jobs.pop(job)

    def _receive(self) -> Any:
        """Return the next message. Signals of jobs that have ended are kept for `wait`."""
        from jeepney import HeaderFields

        try:
            while (message := self._parser.get_next_message()) is None:
                rest = self._deadline - time.monotonic()
                if rest <= 0:
                    raise TimeoutError
                self._socket.settimeout(rest)
                data = self._socket.recv(1 << 16)
                if not data:
                    raise ContainerError("systemd has closed the connection")
                self._parser.add_data(data)
        except TimeoutError:
            raise DeadlineExceeded(f"systemd has not answered within {SYSTEMD_TIMEOUT:g} s") from None
        except OSError as error:
            raise ContainerError(f"systemd: {error.strerror or error}") from None
        if message.header.fields.get(HeaderFields.member) == "JobRemoved" and len(message.body) == 4:
            _, job, _, result = message.body
            self._jobs[job] = result
        return message
