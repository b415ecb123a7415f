"""The page handler of a lazy restore (handler_process.py), as the restoring process sees it.

    before the freeze     start, place, await_ready
    images have come      load, await_loaded
    CRIU may restore      it connects to the socket beside the images
    container runs        resumed, leave
    restore failed        leave, kill the tree, await_end

It needs its starter no longer once it is loaded. It is never killed, because a process of the container that is alive
all the same would then read zeros: it exits when all memory is in place, or all processes are gone. Without `resumed`
it keeps the store as it is, because another restore may need it.
"""

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from migrate.errors import DeadlineExceeded, TargetError
from migrate.limits import HANDLER_EXIT_TIMEOUT, HANDLER_LOAD_TIMEOUT, HANDLER_START_TIMEOUT
from migrate.memory.worker import FAILED, LOAD, LOADED, READY, RESUMED, SOCKET
from runtime.cgroups import monitor as monitor_cgroup
from runtime.cgroups.cgroup import Cgroup
from runtime.linux import processes, selfexec
from runtime.state import lazy

_ANSWER = 4096


class PageHandler:
    """Use `start`."""

    def __init__(self, process: "subprocess.Popen[bytes]", sock: socket.socket, place: Path, note: int) -> None:
        self._process, self._socket, self._place, self._note = process, sock, place, note

    @classmethod
    def start(cls, images: Path, note: Path, work: Path | None = None, digests: bytes | None = None) -> Self:
        """Start it for images that are to come, without waiting for it: CRIU's socket listens when this returns.

        `note` is the container's (runtime.state.lazy). CRIU looks for the socket in its work directory, which is
        `images` if it is not given. With `digests`, of all blocks of their pages (image_source.py), the images have the
        memory, and stay as they are; otherwise a store beside them has it. Raises OSError.
        """
        place = (work or images) / SOCKET
        with contextlib.ExitStack() as stack:
            listening = stack.enter_context(_listen(place))
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(theirs)
            with contextlib.ExitStack() as failed:
                failed.enter_context(ours)
                failed.callback(place.unlink, missing_ok=True)
                locked = _make_note(note)
                stack.callback(os.close, locked)
                failed.callback(note.unlink, missing_ok=True)
                watched = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                failed.callback(os.close, watched)
                passed = [theirs.fileno(), listening.fileno(), locked]
                if digests is not None:
                    passed.append(_in_memory(digests))
                    stack.callback(os.close, passed[-1])
                argv = selfexec.command("migrate.memory.handler_process", str(images), str(note), *map(str, passed))
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=passed, cwd="/", start_new_session=True,
                )  # fmt: skip
                failed.pop_all()
        return cls(process, ours, place, watched)

    def await_ready(self) -> None:
        """Wait until its processes run. Raises TargetError, DeadlineExceeded."""
        self._await(READY, HANDLER_START_TIMEOUT)

    def place(self, cgroup: Cgroup) -> None:
        """Put it beside the container's monitor, so that it outlives this process's cgroup; `await_ready` before.

        Raises ContainerError.
        """
        for pid in processes.descendants(self._process.pid):
            monitor_cgroup.put_aside(cgroup, pid)

    def load(self) -> None:
        """Images and store are complete: let it read them."""
        self._say(LOAD)

    def await_loaded(self) -> None:
        """Wait until it knows what is missing, and that the store has it. Raises TargetError, DeadlineExceeded."""
        self._await(LOADED, HANDLER_LOAD_TIMEOUT)

    def resumed(self) -> None:
        """The container runs, and nobody else needs the store: fill all memory, and free the store meanwhile."""
        self._say(RESUMED)

    def leave(self) -> None:
        """Leave it to itself. Harmless when that is done."""
        self._socket.close()
        self._process.poll()

    def await_end(self) -> None:
        """Wait for its end, once it is left to itself and the tree is dead. Raises DeadlineExceeded."""
        self.leave()
        if self._note >= 0:
            try:
                _await_end(self._note)
                self._process.wait(HANDLER_EXIT_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise _overdue() from None
            finally:
                os.close(self._note)
                self._note = -1
                self._place.unlink(missing_ok=True)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended: everything is in place, or the note tells
            self._socket.send(word)

    def _await(self, answer: bytes, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                got = self._socket.recv(_ANSWER)
            except TimeoutError:
                raise DeadlineExceeded(f"the page handler did not answer within {timeout:g} s") from None
            except OSError:
                got = b""
            if got == answer:
                return
            if got.startswith(FAILED):
                raise TargetError(f"the page handler: {got[1:].decode(errors='replace')}")
            if not got:
                raise TargetError("the page handler has ended: its processes were killed")


def await_end_of_left(note: Path) -> None:
    """Wait for the end of a page handler that a dead process has left, whose tree is dead. Raises DeadlineExceeded."""
    try:
        fd = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _await_end(fd)
        note.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _await_end(note: int) -> None:
    """Wait until none of its processes holds the note's lock. Raises DeadlineExceeded."""
    deadline = time.monotonic() + HANDLER_EXIT_TIMEOUT
    while lazy.is_locked(note):
        if time.monotonic() > deadline:
            raise _overdue()
        select.select([], [], [], 0.002)


def _overdue() -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the page handler did not exit within {HANDLER_EXIT_TIMEOUT:g} s: it is stopped, or a process is alive"
    )


def _listen(place: Path) -> socket.socket:
    """Listen at a place. The name of a socket must be short, so its directory is named by its descriptor."""
    directory = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        place.unlink(missing_ok=True)
        listening.bind(f"/proc/self/fd/{directory}/{place.name}")
        listening.listen(1)
    except BaseException:
        listening.close()
        raise
    finally:
        os.close(directory)
    return listening


def _make_note(note: Path) -> int:
    """Make the note, which is locked when it appears. Raises OSError."""
    new = note.with_name(f".{note.name}.{os.getpid()}")
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, lazy.describe(0, 0, 0))
        new.rename(note)
    except BaseException:
        os.close(fd)
        new.unlink(missing_ok=True)
        raise
    return fd


def _in_memory(data: bytes) -> int:
    """Return a descriptor of a file in memory with this contents."""
    fd = os.memfd_create("pymigrate-page-digests", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd
