"""`criu swrk FD`: one CRIU process that answers on a SOCK_SEQPACKET socket, one protobuf message a packet."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from criu_rpc import messages, tar
from criu_rpc.errors import BadAnswer, CriuNotFound, SwrkDied, overdue
from criu_rpc.limits import CLOSE_TIMEOUT, REAP_TIMEOUT

_PLACES = ("/opt/pymigrate/sbin/criu",)
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(path: str | None = None) -> str:
    """Return the binary: `path`, $PYMIGRATE_CRIU, pymigrate's own, or the one on the PATH. Raises CriuNotFound."""
    named = path or os.environ.get("PYMIGRATE_CRIU")
    if named:
        if not os.access(named, os.X_OK):
            raise CriuNotFound(f"{named} is not an executable criu", remedy="correct $PYMIGRATE_CRIU")
        return named
    for place in _PLACES:
        if os.access(place, os.X_OK):
            return place
    # Never in the current directory.
    places = [place for place in os.environ.get("PATH", "").split(":") if place.startswith("/")]
    found = shutil.which("criu", path=":".join([*places, _SEARCH]))
    if found is None:
        raise CriuNotFound("criu is not installed", remedy="apt-get install criu, or run vagrant/provision.sh")
    return found


def _environment(base: dict[str, str]) -> dict[str, str]:
    """Return `base` without another user's HOME (`su -m`): CRIU's configuration there can name programs."""
    home = base.get("HOME", "")
    try:
        if os.stat(home).st_uid in (0, os.geteuid()):
            return base
    except OSError:
        pass
    return {name: value for name, value in base.items() if name != "HOME"}


class Swrk:
    """The connection to one CRIU process. A context manager: leaving it ends the process."""

    def __init__(self, sock: socket.socket, process: "subprocess.Popen[bytes] | None") -> None:
        self._sock, self._process = sock, process

    @classmethod
    def spawn(cls, path: str, *, pass_fds: Sequence[int] = (), env: Mapping[str, str] | None = None) -> Self:
        """Start `path` as a child, which inherits only `pass_fds` and the environment `env` (or this process's)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = subprocess.Popen(
                    [path, "swrk", str(theirs.fileno())],
                    pass_fds=[theirs.fileno(), *pass_fds],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=_environment(tar.environment(env)),
                    start_new_session=True,  # Ctrl-C at a terminal is for this process, not for CRIU
                )
        except OSError as error:
            ours.close()
            raise CriuNotFound(f"{path} cannot be started: {error.strerror}") from None
        return cls(ours, process)

    @classmethod
    def adopt(cls, sock: socket.socket) -> Self:
        """Speak with a CRIU that another process started on the other end of `sock`, which this process made."""
        return cls(sock, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: Any, request: str) -> None:
        """Send one criu_req. Raises SwrkDied."""
        try:
            self._sock.settimeout(CLOSE_TIMEOUT)
            self._sock.send(message.SerializeToString())
        except TimeoutError:
            raise overdue(request, CLOSE_TIMEOUT) from None
        except OSError:
            raise SwrkDied(request, self._status()) from None

    def recv(self, request: str, timeout: float) -> tuple[Any, int | None]:
        """Receive the next criu_resp, and the descriptor that came with it, if any.

        Raises DeadlineExceeded after `timeout` seconds, SwrkDied, BadAnswer.
        """
        self._sock.settimeout(max(timeout, 0.001))
        try:
            size = self._sock.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
            data, fds, _, _ = socket.recv_fds(self._sock, max(size, 1), 4)
        except TimeoutError:
            raise overdue(request, timeout) from None
        except OSError:
            raise SwrkDied(request, self._status()) from None
        for fd in fds[1:]:
            os.close(fd)
        if not data:
            raise SwrkDied(request, self._status())
        answer = messages.rpc().criu_resp()
        try:
            answer.ParseFromString(data)
        except Exception as error:  # protobuf's DecodeError; its class differs between implementations
            for fd in fds[:1]:
                os.close(fd)
            raise BadAnswer(request, f"{len(data)} bytes that are not a criu_resp: {error}") from None
        return answer, fds[0] if fds else None

    @property
    def process_id(self) -> int:
        return self._process.pid if self._process is not None else 0

    def require_alive(self, request: str) -> None:
        """Raise SwrkDied if CRIU has exited; nothing else shows that while no request is sent."""
        poll = select.poll()
        poll.register(self._sock, 0)
        if poll.poll(0):
            raise SwrkDied(request, self._status())

    def close(self) -> None:
        """Close the socket, which makes CRIU undo what it has not finished, and wait until it has exited."""
        self._sock.close()
        if self._process is not None and self._process.returncode is None:
            try:
                self._process.wait(CLOSE_TIMEOUT)
            except subprocess.TimeoutExpired:
                _kill(self._process)
                self._process.wait()

    def kill(self) -> None:
        """Kill CRIU."""
        if self._process is not None:
            _kill(self._process)
        self.close()

    def _status(self) -> int | None:
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(REAP_TIMEOUT)
        return None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a CRIU that was started in its own session, and its children.

    On a kernel that it has not seen yet, it runs tests with children that stop themselves (criu/kerndat.c,
    kerndat_breakpoints; criu/vdso.c). They would stay for ever without CRIU.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


class PageServer:
    """`criu page-server` on a connected socket: it writes pages-*.img and pagemap-*.img into a directory."""

    LOG = "page-server.log"

    def __init__(self, process: "subprocess.Popen[bytes]", images: Path) -> None:
        self._process, self._images = process, images

    @classmethod
    def start(cls, path: str, images: Path, sock: socket.socket) -> Self:
        """Serve `sock` (the caller closes its copy) into the directory `images`. Raises CriuNotFound."""
        argv = [path, "page-server", "-D", str(images), "-o", cls.LOG, "-v4", "--ps-socket", str(sock.fileno())]
        null = subprocess.DEVNULL
        try:
            process = subprocess.Popen(
                argv, pass_fds=[sock.fileno()], stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True
            )
        except OSError as error:
            raise CriuNotFound(f"{path} cannot be started: {error.strerror}") from None
        return cls(process, images)

    def wait(self, timeout: float) -> None:
        """Wait until everything received is in the images. Raises SwrkDied or DeadlineExceeded (it is killed then)."""
        from criu_rpc import logs

        deadline = time.monotonic() + timeout
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise overdue("page server", timeout) from None
        if status != 0:
            fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
            try:
                lines, log = logs.tail(fd, self.LOG)
            finally:
                os.close(fd)
            raise SwrkDied("page server", status, log_tail=lines, log_path=log)

    def kill(self) -> None:
        _kill(self._process)
        self._process.wait()
