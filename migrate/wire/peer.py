"""The other host: an SSH session, the agent started over it, and calls to that agent.

Nothing is installed at the target: the agent's code goes over the connection (wire/agent_zip.py). A short first stage
reads exactly that many bytes, checks their SHA-256, writes them 0700 under /run/pymigrate and becomes the agent.
What the log-in prints before is skipped up to a banner that holds a random token.
"""

import collections
import contextlib
import queue
import secrets
import shlex
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import paramiko

from migrate.errors import DeadlineExceeded, HostError, MigrateError, ProtocolError, TargetError
from migrate.wire import protocol, ssh
from migrate.wire.agent_zip import AgentZip
from migrate.wire.protocol import Call, FrameDecoder, FrameType

START_TIMEOUT = 30.0
CALL_TIMEOUT = 30.0
SILENCE = 11.0  # two pulses of the agent's
SEND_TIMEOUT = 60.0  # in which the target must take some of what is sent
PULSES = 100  # that may come at once, and PULSES_PER_SECOND all the time
PULSES_PER_SECOND = 10
STDERR_LIMIT = 16 << 20  # bytes that are looked at
_NOISE_LIMIT = 256 << 10

# Runs at the target under `python3 -I -S -c`; no single quotes inside, for the login shell's sake.
_FIRST_STAGE = """
import hashlib, os, stat, sys
digest, size, token, have, temporary = sys.argv[1], int(sys.argv[2]), sys.argv[3], False, ""
if sys.version_info < (3, 11): sys.exit(70)
if os.geteuid() != 0: sys.exit(71)
top = "/run/pymigrate"
path = top + "/agent-" + digest + ".pyz"
def others(info): return info.st_uid or info.st_mode & 0o22
try:
    if not os.path.lexists(top): os.mkdir(top, 0o700)
    there = os.open(top, os.O_DIRECTORY | os.O_NOFOLLOW)
    if others(os.fstat(there)): sys.exit(75)
    os.fchmod(there, 0o700)
    if os.path.lexists(path):
        info = os.lstat(path)
        if stat.S_ISREG(info.st_mode) and info.st_size == size and not others(info):
            with open(path, "rb") as f: have = hashlib.sha256(f.read()).hexdigest() == digest
    if not have:
        temporary = path + "." + str(os.getpid())
        out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        os.posix_fallocate(out, 0, size)
    os.write(1, ("PYMIGRATE-AGENT " + token + (" HAVE" if have else " SEND") + chr(10)).encode())
    if not have:
        data = bytearray()
        while len(data) < size:
            piece = os.read(0, size - len(data))
            if not piece: sys.exit(73)
            data += piece
        if hashlib.sha256(data).hexdigest() != digest: sys.exit(74)
        with open(out, "wb") as f: f.write(data)
        os.rename(temporary, path)
except OSError as error:
    disk = os.statvfs("/run")
    free = disk.f_bavail * disk.f_frsize >> 10
    print(error.strerror, "(%d KiB needed, %d KiB free)" % (size + 1023 >> 10, free), file=sys.stderr)
    sys.exit(72)
finally:
    if temporary and os.path.exists(temporary): os.unlink(temporary)
os.execv(sys.executable, [sys.executable, "-I", "-S", path, "agent"])
""".strip()

_START_FAILURES: dict[int, tuple[str, str]] = {
    70: ("python3 is older than 3.11", "install python3 3.11 or newer there"),
    71: ("the log-in is not root", "log in as root: `User root` for this host in ~/.ssh/config"),
    72: ("/run/pymigrate cannot be written", "make room or remove what is in the way there"),
    73: ("the connection ended while the agent was being sent", "try again"),
    74: ("the agent arrived damaged", "try again; if it stays so, look at the network between the hosts"),
    75: ("/run/pymigrate can be changed by other users than root", "remove it there, with all that is in it"),
    126: ("python3 cannot be executed", "install python3 there (apt-get install python3)"),
    127: ("python3 is not installed", "install python3 there (apt-get install python3)"),
}

_REMOTE_KINDS = frozenset(
    {"failure", "blocked", "not-found", "conflict", "invalid", "target", "criu", "no-space", "deadline"}
)


class RemoteFailure(MigrateError):
    """The agent answered a call with a failure; `kind` is what it says it was."""

    def __init__(self, message: str, kind: str, remedy: str | None) -> None:
        super().__init__(message, remedy=remedy)
        self.kind = kind


class Channel:
    """A command that runs at the target: its stdin and stdout as a byte stream (what rsync needs)."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def sendall(self, data: bytes) -> None:
        with _lost_as_os_error():
            self._channel.sendall(data)

    def recv(self, size: int) -> bytes:
        return self._channel.recv(size)

    def shutdown_write(self) -> None:
        with _lost_as_os_error():
            self._channel.shutdown_write()

    def exit_status(self, timeout: float = CALL_TIMEOUT) -> int | None:
        """The command's exit status, -1 when a signal has killed it.

        None when it does not tell within `timeout` seconds, or the connection is lost.
        """
        if not self._channel.status_event.wait(timeout):
            return None
        status = self._channel.recv_exit_status()
        return None if status == -1 and not _is_connected(self._channel) else status

    def errors(self) -> str:
        """What the command has written to stderr, its last 8 KiB, once it has ended."""
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
def _lost_as_os_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, paramiko.SSHException) as error:  # what paramiko's transport dies of
        raise ConnectionError(str(error) or "the connection was closed") from None


class Peer:
    """The agent on the other host. Thread-safe for sending; calls are made by one thread."""

    def __init__(self, name: str, client: paramiko.SSHClient, channel: paramiko.Channel) -> None:
        self.name = name
        self._client, self._channel = client, channel
        self._send_lock = threading.Lock()
        self._answers: queue.SimpleQueue[tuple[FrameType, bytes] | None] = queue.SimpleQueue()
        self._lost: MigrateError | None = None
        self._signs, self._pulses = b"", 0
        self._began = self._heard = time.monotonic()
        self._asked: collections.deque[Call] = collections.deque()  # calls whose answers have not been taken yet
        self._posted = self._answered = 0  # calls that have an answer, and answers that have come
        self._sending = False  # true for good when a message was cut short
        self.bytes_sent = 0
        self._reader = threading.Thread(target=self._read, name=f"peer-{name}", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the agent takes that for an abort unless it was told to resume."""
        for end in (self._channel, self._client):
            with contextlib.suppress(Exception):  # paramiko raises whatever its transport died of
                end.close()

    def start(self, root: str) -> None:
        """First exchange: both sides must speak the same protocol."""
        self._reader.start()
        version = self.call(protocol.Hello(protocol.VERSION, root))["version"]
        if version != protocol.VERSION:
            raise ProtocolError(f"{self.name}: the agent speaks protocol {version}, not {protocol.VERSION}")

    def limit(self, timeout: float = SEND_TIMEOUT) -> None:
        """From now on: give up sending when the target takes nothing for `timeout` seconds."""
        self._channel.settimeout(min(timeout, SEND_TIMEOUT))

    def call(self, call: Call, timeout: float = CALL_TIMEOUT) -> dict[str, Any]:
        """Send a call and wait for its answer; answers to earlier calls that nobody took are dropped.

        Raises RemoteFailure (the agent's own words), DeadlineExceeded, HostError when the connection is lost.
        """
        self.post(call)
        while len(self._asked) > 1:
            with contextlib.suppress(RemoteFailure):
                self.answer(timeout)
        return self.answer(timeout)

    def post(self, call: Call) -> None:
        """Send a call without waiting for its answer, which `answer` takes."""
        if not isinstance(call, protocol.Image):
            self._asked.append(call)
            self._posted += 1  # before it is sent: the answer may be there at once
        self._send(protocol.encode_call(call))

    def answer(self, timeout: float = CALL_TIMEOUT) -> dict[str, Any]:
        """The answer to the oldest call that has none yet, of the shape that it must have."""
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
            message = protocol.loads(payload)
            if kind is FrameType.REPLY:
                protocol.check_answer(call, message)
                return message
        except ProtocolError as error:
            raise ProtocolError(f"{self.name}: {error}") from None
        failure = str(message.get("kind"))
        remedy = message.get("remedy")
        raise RemoteFailure(
            f"{self.name}: {_line(message.get('message'))}",
            failure if failure in _REMOTE_KINDS else "target",
            _line(remedy) if remedy else None,
        )

    def send_pages(self, data: bytes) -> None:
        """Relay a piece of CRIU's page stream (at most protocol.CHUNK bytes)."""
        self._send(protocol.header(FrameType.PAGES, len(data)) + data)

    def send_data(self, data: bytes) -> None:
        """The next bytes of the image announced last."""
        self._send(protocol.header(FrameType.DATA, len(data)) + data)

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
        """Changes while processes there receive files. Raises HostError when the agent or the connection is lost."""
        if self._lost is not None:
            raise self._lost
        return self._signs

    def is_silent(self) -> bool:
        """Whether the agent does not even send pulses."""
        return time.monotonic() - self._heard > SILENCE

    def facts(self, query: Any) -> Any:
        """The target's HostFacts for a FactsQuery."""
        from migrate.preflight.hostfacts import HostFacts

        answer = self.call(protocol.Facts(query.to_json()), timeout=60)
        try:
            return HostFacts.from_json(answer)
        except ProtocolError as error:
            raise ProtocolError(f"{self.name}: {error}") from None

    def _send(self, data: bytes) -> None:
        try:
            with self._send_lock:
                if self._sending:
                    raise HostError(f"{self.name}: a message to it was cut short")
                self._sending = True
                self._channel.sendall(data)
                self._sending = False
                self.bytes_sent += len(data)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name}: the host takes no data") from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._lost or HostError(f"{self.name}: the connection was lost: {error}") from None

    def _read(self) -> None:
        """Reader thread: sorts frames until the connection ends, then says why it ended."""
        decoder = FrameDecoder()
        self._channel.settimeout(SEND_TIMEOUT)  # a channel has one for both ways; to wait for an answer is `answer`'s
        try:
            while data := self._receive():
                self._heard = time.monotonic()
                for kind, payload in decoder.feed(data):
                    self._sort(kind, payload)
            self._lost = HostError(f"{self.name}: {self._epitaph()}")
        except ProtocolError as error:
            self._lost = ProtocolError(f"{self.name}: the agent does not keep to the protocol: {error}")
            self.close()
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._lost = HostError(f"{self.name}: the connection was lost: {error}")
        finally:
            self._answers.put(None)

    def _sort(self, kind: FrameType, payload: bytes) -> None:
        """Take one frame. Raises ProtocolError for any that nobody asked for: they would pile up here."""
        if kind in (FrameType.REPLY, FrameType.FAILURE):
            self._answered += 1
            if self._answered > self._posted:
                raise ProtocolError("an answer came that nobody awaits")
            self._answers.put((kind, payload))
        elif kind is FrameType.PULSE:
            self._pulses += 1
            if self._pulses > PULSES + PULSES_PER_SECOND * (self._heard - self._began):
                raise ProtocolError("a flood of PULSE frames came")
            self._signs = payload
        else:
            raise ProtocolError(f"a {kind.name} frame came from the target")

    def _receive(self) -> bytes:
        """What comes next, however long that takes; b"" at the end."""
        while True:
            with contextlib.suppress(TimeoutError):
                return self._channel.recv(1 << 18)

    def _epitaph(self) -> str:
        """Why an agent that ended has ended, from its exit status and the last line it wrote to stderr."""
        if not self._channel.status_event.wait(2.0):
            return "the connection was lost"
        status = self._channel.recv_exit_status()
        if status == -1:
            return "the agent was killed" if _is_connected(self._channel) else "the connection was lost"
        words = _last_line(self._channel) if self._channel.recv_stderr_ready() else ""
        return f"the agent ended with exit status {status}{': ' + words if words else ''}"


def connect(host: str, *, root: str, agent: AgentZip | None = None) -> Peer:
    """Log in to `host` ([USER@]NAME), start the agent there, and agree on the protocol.

    Raises HostError (cannot log in), TargetError (logged in, but the agent cannot run), DeadlineExceeded.
    """
    agent = agent or AgentZip.build()
    client = ssh.login(host)
    try:
        channel = _start_agent(host, client, agent)
        peer = Peer(host, client, channel)
        peer.start(root)
    except BaseException:
        client.close()
        raise
    return peer


def _start_agent(host: str, client: paramiko.SSHClient, agent: AgentZip) -> paramiko.Channel:
    """Run the first stage, give it the agent if it has none, and return the channel the agent speaks on."""
    token = secrets.token_hex(16)
    arguments = [_FIRST_STAGE, agent.digest, str(len(agent.data)), token]
    deadline = time.monotonic() + START_TIMEOUT
    transport = client.get_transport()
    if transport is None:
        raise HostError(f"{host}: the connection was lost")
    try:
        channel = transport.open_session(window_size=ssh.WINDOW, max_packet_size=64 << 10, timeout=START_TIMEOUT)
        channel.exec_command("exec python3 -I -S -c " + shlex.join(arguments))
        channel.settimeout(START_TIMEOUT)
        answer = _await_banner(host, channel, token, deadline)
        if answer == b"SEND":
            channel.sendall(agent.data)
        elif answer != b"HAVE":
            raise TargetError(f"{host}: the agent's first stage answered {answer[:40]!r}")
    except TimeoutError:
        raise DeadlineExceeded(f"{host}: the agent did not start within {START_TIMEOUT:g} s") from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostError(f"{host}: the connection was lost while the agent started: {error}") from None
    return channel


def _await_banner(host: str, channel: paramiko.Channel, token: str, deadline: float) -> bytes:
    """Skip what the log-in prints up to the banner line; return its last word."""
    mark = f"PYMIGRATE-AGENT {token} ".encode()
    seen = bytearray()
    while True:
        start = seen.find(mark)
        if start >= 0 and (end := seen.find(b"\n", start)) >= 0:
            return bytes(seen[start + len(mark) : end]).strip()
        if len(seen) > _NOISE_LIMIT:
            raise TargetError(
                f"{host}: the log-in prints without end instead of running a command",
                remedy=f"`ssh {host} true` must print nothing; look at root's shell start-up files there",
            )
        # One byte at a time near the end would be needed if the agent spoke first; it does not.
        data = channel.recv(4096)
        if not data:
            raise _start_failure(host, channel)
        seen += data
        if time.monotonic() > deadline:
            raise TimeoutError


def _start_failure(host: str, channel: paramiko.Channel) -> TargetError:
    status = channel.recv_exit_status() if channel.status_event.wait(5) else -1
    words = _last_line(channel)
    known = _START_FAILURES.get(status)
    if known is not None:
        return TargetError(f"{host}: {known[0]}{f': {words}' if words else ''}", remedy=known[1])
    return TargetError(
        f"{host}: the agent cannot start there (exit status {status}{': ' + words if words else ''})",
        remedy=f"does `ssh {host} python3 -c 1` work?",
    )


def _is_connected(channel: paramiko.Channel) -> bool:
    transport = channel.get_transport()
    return transport is not None and transport.is_active()


def _last_line(channel: paramiko.Channel) -> str:
    channel.settimeout(1.0)
    with contextlib.suppress(TimeoutError, OSError):
        return _line((channel.recv_stderr(8192).decode(errors="replace").strip().splitlines() or [""])[-1])
    return ""


def _line(value: object) -> str:
    """Text from the other host as one printable line of bounded length."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:2000]
