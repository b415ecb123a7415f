"""What a target receives of a container: image files by name, and the page stream, each checked by size and digest."""

import contextlib
import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import Self

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError
from criu_rpc.swrk import PageServer
from migrate.errors import ProtocolError, TargetError
from migrate.hostfacts import DATA
from migrate.space import FULL, is_full, no_space


class ReceivedImages:
    """The directory of one migration's images, and the image that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._name, self._left, self._digest = "", 0, ""
        self._hash = hashlib.sha256()
        self._count = self._unwritten = 0
        self._failure: Exception | None = None

    @classmethod
    def make(cls, migration: str) -> Self:
        path = DATA / "incoming" / migration
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
        return cls(path)

    @classmethod
    def existing(cls, migration: str) -> Self:
        return cls(DATA / "incoming" / migration)

    def begin(self, name: str, size: int, digest: str) -> None:
        """A failure here or in `write` is kept for `check`: these calls have no answer."""
        if self._left:
            raise ProtocolError(f"image {name} came in the middle of {self._name}")
        self._name, self._left, self._digest, self._hash = name, size, digest, hashlib.sha256()
        try:
            self._fd = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            self._failure = self._failure or error
        if size == 0:
            self._end()

    def write(self, payload: bytes) -> None:
        if len(payload) > self._left:
            raise ProtocolError(f"image {self._name} is longer than was said")
        self._hash.update(payload)
        self._left -= len(payload)
        if self._fd >= 0 and self._failure is None:
            try:
                view = memoryview(payload)
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError as error:
                error.filename = str(self.path / self._name)
                self._failure = error
        if self._failure is not None:
            self._unwritten += len(payload)
        if self._left == 0:
            self._end()

    def _end(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._count += 1
        if self._hash.hexdigest() != self._digest:
            self._failure = self._failure or TargetError(f"image {self._name} arrived damaged")

    def check(self, count: int) -> None:
        """Raise what went wrong with any image; all `count` must be here."""
        if isinstance(self._failure, OSError) and self._failure.errno in FULL:
            raise no_space(self.path, self._unwritten)
        if self._failure is not None:
            raise self._failure
        if self._left or self._count != count:
            raise ProtocolError(f"{self._count} of {count} images have come")

    def remove(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        shutil.rmtree(self.path, ignore_errors=True)


class ReceivedPages:
    """What comes over the wire goes into one end of a socketpair; CRIU's page server has the other."""

    def __init__(self, images: Path, server: PageServer, ours: socket.socket, timeout: float) -> None:
        self._images, self._server, self._socket, self._timeout = images, server, ours, timeout
        self._size, self._hash = 0, hashlib.sha256()
        self._broken = False

    @classmethod
    def start(cls, images: Path, timeout: float) -> Self:
        """The page server must not let itself be waited for longer than `timeout` seconds."""
        ours, theirs = socket.socketpair()
        with theirs:
            server = Criu().page_server(images, theirs)
        ours.settimeout(timeout)
        return cls(images, server, ours, timeout)

    def feed(self, payload: bytes) -> None:
        """A server that is dead or full does not answer any more; why shows in `finish`."""
        self._size += len(payload)
        self._hash.update(payload)
        if not self._broken:
            try:
                self._socket.sendall(payload)
            except OSError:
                self._broken = True

    def finish(self, size: int, digest: str) -> None:
        """Wait until the page server has ended; it must have had all that was sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(4096):  # its answers, which the source has given CRIU in its place
                pass
        self._socket.close()
        try:
            self._server.wait(self._timeout)
        except CriuError as error:
            if is_full(self._images, error):
                raise no_space(
                    self._images, size - sum(path.stat().st_size for path in self._images.iterdir())
                ) from None
            raise
        if (self._size, self._hash.hexdigest()) != (size, digest):
            raise TargetError("the memory pages arrived damaged")

    def kill(self) -> None:
        self._socket.close()
        self._server.kill()
