"""The other host: an SSH session, the agent started over it, and calls to that agent.

Nothing is installed at the target: the agent's code goes over the connection (wire/agent_zip.py). A short first stage
reads exactly that many bytes, checks their SHA-256, writes them 0700 under /run/pymigrate and becomes the agent.
Output of the log-in is skipped up to a banner with a random token.
"""

import collections
import contextlib
import math
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import paramiko

from migrate.errors import DeadlineExceeded, HostError, MigrateError, ProtocolError
from migrate.limits import AGENT_SILENCE, CALL_TIMEOUT, SEND_TIMEOUT
from migrate.wire import bulk, digests, frames, protocol, ssh
from migrate.wire.agent_zip import AgentZip
from migrate.wire.bootstrap import reach, start_agent
from migrate.wire.channel import Channel, is_connected, last_line, line
from migrate.wire.frames import FrameDecoder, FrameType
from migrate.wire.native import Buffer
from migrate.wire.protocol import Call

PULSES = 100  # that may come at once, and PULSES_PER_SECOND all the time
PULSES_PER_SECOND = 10

R = TypeVar("R")

_REMOTE_KINDS = frozenset(
    {"failure", "blocked", "not-found", "conflict", "invalid", "target", "criu", "no-space", "deadline"}
)


class RemoteFailure(MigrateError):
    """The agent answered a call with a failure; `kind` is the kind that the agent reports."""

    def __init__(self, message: str, kind: str, remedy: str | None) -> None:
        super().__init__(message, remedy=remedy)
        self.kind = kind


class Peer:
    """The agent on the other host. Thread-safe for sending; calls are made by one thread.

    `shared`: others use the connection too, and closing the peer does not end it.
    """

    def __init__(
        self, name: str, client: paramiko.SSHClient, channel: paramiko.Channel, *, shared: bool = False
    ) -> None:
        self.name = name
        self._client, self._channel, self._shared = client, channel, shared
        self._send_lock = threading.Lock()
        self._answers: queue.SimpleQueue[tuple[FrameType, bytes] | None] = queue.SimpleQueue()
        self._lost: MigrateError | None = None
        self._signs, self._pulses = b"", 0
        self._began = self._heard = time.monotonic()
        self._asked: collections.deque[Call[Any]] = collections.deque()  # calls whose answers have not been taken yet
        self._posted = self._answered = 0  # calls that have an answer, and answers that have come
        self._sending = False  # true for good when a message was cut short
        self.bytes_sent = 0
        self.offers: tuple[str, ...] = ()  # HostFacts.offers, once the facts are known
        self.round_trip = math.inf  # seconds of the fastest call
        self._reader = threading.Thread(target=self._read, name=f"peer-{name}", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation. The agent takes that for an abort unless it was told to resume."""
        for end in (self._channel,) if self._shared else (self._channel, self._client):
            with contextlib.suppress(Exception):  # paramiko raises whatever its transport died of
                end.close()

    def start(self, root: str) -> None:
        """Exchange greetings. Raises ProtocolError unless both sides speak the same protocol."""
        self._reader.start()
        version = self.call(protocol.Hello(protocol.VERSION, root)).version
        if version != protocol.VERSION:
            raise ProtocolError(f"{self.name}: the agent speaks protocol {version}, not {protocol.VERSION}")

    @property
    def digest(self) -> str:
        """The name of the digest that both hosts compute."""
        return digests.agree(self.offers)

    def limit(self, timeout: float = SEND_TIMEOUT) -> None:
        """From now on, sending fails when the target takes nothing for `timeout` seconds."""
        self._channel.settimeout(min(timeout, SEND_TIMEOUT))

    def call(self, call: Call[R], timeout: float = CALL_TIMEOUT) -> R:
        """Send a call and return its reply. Replies to earlier calls that `answer` has not taken are dropped.

        Raises RemoteFailure (the agent's own words), DeadlineExceeded, HostError when the connection is lost.
        """
        begun = time.monotonic()
        self.post(call)
        while len(self._asked) > 1:
            with contextlib.suppress(RemoteFailure):
                self.answer(timeout)
        reply: R = self.answer(timeout)
        self.round_trip = min(self.round_trip, time.monotonic() - begun)
        return reply

    def post(self, call: Call[Any]) -> None:
        """Send a call without waiting for its answer, if it has one; `answer` takes that."""
        if call.reply is not None:
            self._asked.append(call)
            self._posted += 1  # before it is sent: the answer may be there at once
        self._send(protocol.encode_call(call))

    def answer(self, timeout: float = CALL_TIMEOUT) -> Any:
        """Return the reply to the oldest call that has none yet. Raises as `call` does."""
        call = self._asked[0]
        what = type(call).__name__
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise DeadlineExceeded(
                f"{self.name}: no answer to {what} within {timeout:g} s", remedy="is the host overloaded or cut off?"
            ) from None
        if answer is None:
            self._answers.put(None)
            raise self._lost or HostError(f"{self.name}: the connection was lost")
        self._asked.popleft()
        kind, payload = answer
        try:
            if kind is FrameType.REPLY:
                return protocol.decode_reply(call, payload)
            failure = protocol.decode_failure(payload)
        except ProtocolError as error:
            raise ProtocolError(f"{self.name}: {error}") from None
        raise RemoteFailure(
            f"{self.name}: {line(failure.message)}",
            failure.kind if failure.kind in _REMOTE_KINDS else "target",
            line(failure.remedy) if failure.remedy else None,
        )

    def send_pages(self, payload: tuple[Buffer, ...]) -> None:
        """Send the parts of one payload with a piece of CRIU's page stream (codec.py)."""
        self._send(frames.header(FrameType.PAGES, sum(map(len, payload))), *payload)

    def send_data(self, data: bytes) -> None:
        """Send the next bytes of the image that was named last."""
        self._send(frames.header(FrameType.DATA, len(data)), data)

    def send_memory(self, payload: tuple[Buffer, ...]) -> None:
        """Send the parts of one payload with a piece of the container's memory (codec.py)."""
        self._send(frames.header(FrameType.MEMORY, sum(map(len, payload))), *payload)

    def open_channel(self, command: str) -> Channel:
        """Run `command` at the target on a channel of its own over the same connection."""
        transport = self._client.get_transport()
        try:
            if transport is None:
                raise self._lost or HostError(f"{self.name}: the connection was lost")
            channel = transport.open_session(timeout=CALL_TIMEOUT)
            channel.exec_command(command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._lost or HostError(f"{self.name}: cannot open another channel: {error}") from None
        return Channel(channel)

    def signs(self) -> bytes:
        """Return a value that changes while processes there receive files. Raises HostError without a connection."""
        if self._lost is not None:
            raise self._lost
        return self._signs

    @property
    def is_lost(self) -> bool:
        """Whether the agent has exited, or the connection has ended."""
        return self._lost is not None

    def is_silent(self) -> bool:
        """Return whether the agent does not even send pulses."""
        return time.monotonic() - self._heard > AGENT_SILENCE

    def _send(self, *parts: Buffer) -> None:
        try:
            with self._send_lock:
                if self._sending:
                    raise HostError(f"{self.name}: a message to it was cut short")
                self._sending = True
                bulk.send(self._channel, *parts)
                self._sending = False
                self.bytes_sent += sum(map(len, parts))
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name}: the host takes no data") from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost or HostError(f"{self.name}: the connection was lost: {error}") from None

    def _read(self) -> None:
        """Sort frames until the connection ends, then note why it ended. The reader thread runs this."""
        decoder = FrameDecoder()
        self._channel.settimeout(SEND_TIMEOUT)  # one for both directions; `answer` bounds the wait for an answer
        try:
            while data := self._receive():
                self._heard = time.monotonic()
                for kind, payload in decoder.feed(data):
                    self._sort(kind, payload)
            self._lost = HostError(f"{self.name}: {self._epitaph()}")
        except ProtocolError as error:
            self._lost = ProtocolError(f"{self.name}: the agent violates the protocol: {error}")
            self.close()
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._lost = HostError(f"{self.name}: the connection was lost: {error}")
        finally:
            self._answers.put(None)

    def _sort(self, kind: FrameType, payload: bytes) -> None:
        """Take one frame. Raises ProtocolError for one that was not asked for: such frames would pile up here."""
        if kind in (FrameType.REPLY, FrameType.FAILURE):
            self._answered += 1
            if self._answered > self._posted:
                raise ProtocolError("an answer came to a call that was not made")
            self._answers.put((kind, payload))
        elif kind is FrameType.PULSE:
            self._pulses += 1
            if self._pulses > PULSES + PULSES_PER_SECOND * (self._heard - self._began):
                raise ProtocolError("a flood of PULSE frames came")
            self._signs = payload
        else:
            raise ProtocolError(f"a {kind.name} frame came from the target")

    def _receive(self) -> bytes:
        """Return the next bytes, however long they take; b"" at the end."""
        while True:
            with contextlib.suppress(TimeoutError):
                return self._channel.recv(1 << 18)

    def _epitaph(self) -> str:
        """Return why the agent has exited, from its exit status and the last line of its stderr."""
        if not self._channel.status_event.wait(2.0):
            return "the connection was lost"
        status = self._channel.recv_exit_status()
        if status == -1:
            return "the agent was killed" if is_connected(self._channel) else "the connection was lost"
        words = last_line(self._channel) if self._channel.recv_stderr_ready() else ""
        return f"the agent exited with status {status}{': ' + words if words else ''}"


class Session:
    """A log-in at `host` ([USER@]NAME), over which an agent is started for each of several moves, one at a time.

    A context manager: leaving it ends the connection. The agent of the next of `moves` moves is started while the files
    of the present one are sent, because a start takes 0.14 s.
    """

    def __init__(self, host: str, moves: int) -> None:
        self._host, self._left = host, moves
        self._agent: AgentZip | None = None
        self._client: paramiko.SSHClient | None = None
        self._starter = ThreadPoolExecutor(1, f"agents-{host}")
        self._next: Future[Peer] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._starter.shutdown(wait=False)

    def close(self) -> None:
        """End the connection; `peer` makes a new one."""
        client, self._client, self._next = self._client, None, None
        if client is not None:
            with contextlib.suppress(Exception):  # as in Peer.close
                client.close()

    def peer(self, root: str) -> Peer:
        """Return a started agent, with which the protocol is agreed. Log in if there is no connection.

        Raises HostError (cannot log in), TargetError (logged in, but the agent cannot run), DeadlineExceeded.
        """
        self._agent = self._agent or AgentZip.load()
        self._left -= 1
        peer = self._started()
        if peer is None or self._client is None:
            if self._client is None or not _is_alive(self._client):
                self.close()
                self._client = ssh.login(self._host)
            peer = self._start(self._client, self._agent, root)
        if self._left > 0:
            self._next = self._starter.submit(self._start, self._client, self._agent, root)
        return peer

    def _start(self, client: paramiko.SSHClient, agent: AgentZip, root: str) -> Peer:
        return greet(self._host, client, start_agent(self._host, client, agent), root, shared=True)

    def _started(self) -> Peer | None:
        """Return the agent that was started ahead, unless that has failed."""
        future, self._next = self._next, None
        if future is None or future.exception() is not None:
            return None
        peer = future.result()
        return None if peer.is_lost else peer


def connect(host: str, *, root: str) -> Peer:
    """Log in to `host` ([USER@]NAME), start the agent there, and agree on the protocol.

    Raises HostError (cannot log in), TargetError (logged in, but the agent cannot run), DeadlineExceeded.
    """
    return greet(host, *reach(host), root)


def greet(host: str, client: paramiko.SSHClient, channel: paramiko.Channel, root: str, *, shared: bool = False) -> Peer:
    """Return the agent behind a channel of `client` once the protocol is agreed. If that fails, close the peer."""
    peer = Peer(host, client, channel, shared=shared)
    try:
        peer.start(root)
    except BaseException:
        peer.close()
        raise
    return peer


def _is_alive(client: paramiko.SSHClient) -> bool:
    transport = client.get_transport()
    return transport is not None and transport.is_active()
