"""The keeper of a move's images (image_keeper_process.py), as its agent sees it: start, notify and kill it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Self

from migrate.errors import DeadlineExceeded
from migrate.limits import KEEPER_DISK_TIMEOUT, KEEPER_EXIT_TIMEOUT, KEEPER_START_TIMEOUT, VERDICT_PATIENCE
from migrate.target import image_places
from runtime.linux import processes, selfexec

_FILE = "keeper.json"  # beside the images


class Keeper:
    """The agent's side."""

    def __init__(self, process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
        self._process, self._socket = process, sock
        self._killed = False

    @classmethod
    def start(cls, migration: str, path: Path, kind: str, lock: int | None) -> Self:
        """Start the keeper of the images at `path`; it inherits their lock. Raises OSError."""
        ours, theirs = socket.socketpair()
        null, inherited = subprocess.DEVNULL, [lock] if lock is not None else []
        with theirs:
            argv = selfexec.command(
                "migrate.target.image_keeper_process", migration, str(path), kind, str(VERDICT_PATIENCE)
            )
            process = subprocess.Popen(
                argv, stdin=theirs.fileno(), stdout=null, stderr=null, pass_fds=inherited, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        keeper = cls(process, ours)
        try:
            known = {"pid": process.pid, "start_time": processes.start_time(process.pid)}
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(path / _FILE, flags, 0o600), "w") as file:
                json.dump(known, file)
        except BaseException:
            keeper.end()
            raise
        return keeper

    @classmethod
    def adopt(cls, migration: str, path: Path) -> None:
        """Start a keeper that takes images without a keeper from memory to the disk, and do not wait for it.

        Raises OSError. Harmless if the images have a keeper.
        """
        lock = image_places.lock(path)
        if lock is not None:
            try:
                keeper = cls.start(migration, path, "memory", lock)
                keeper.watch()
                keeper.leave()
            finally:
                os.close(lock)

    def await_ready(self) -> None:
        """Wait until it is ready, but not for long: it does its work all the same when it is slow."""
        self._socket.settimeout(KEEPER_START_TIMEOUT)
        with contextlib.suppress(OSError):
            self._socket.recv(1)

    def watch(self) -> None:
        """The images may become the last copy from here on."""
        try:
            self._socket.send(b"w")
        except OSError:
            return  # it was killed: `leave` does its work

    def leave(self) -> bool:
        """Leave the images to it; False when it has ended, and nobody takes care of them."""
        if self._killed or self._process.poll() is not None:
            self.end()
            return False
        self._socket.close()
        return True

    def kill(self) -> None:
        """Stop it, without waiting for its end."""
        self._killed = True
        self._process.kill()

    def end(self) -> None:
        """Kill it, and wait until it has exited. Raises DeadlineExceeded when a disk keeps it too long."""
        self._process.kill()
        try:
            self._process.wait(KEEPER_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            words = f"(process {self._process.pid}) did not exit within {KEEPER_EXIT_TIMEOUT:g} s"
            raise DeadlineExceeded(f"the keeper of the images {words}") from None
        finally:
            self._socket.close()


def end_left(*places: Path) -> None:
    """Kill the keeper that a dead agent has left for images at one of these places. Raises DeadlineExceeded."""
    for place in places:
        try:
            fields = json.loads((place / _FILE).read_bytes())
            pid, start_time = int(fields["pid"]), int(fields["start_time"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # there is none
        pidfd = processes.open_process(pid, start_time)
        if pidfd is None:
            continue
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not processes.wait_exit(pidfd, KEEPER_DISK_TIMEOUT):
                words = f"(process {pid}) did not exit within {KEEPER_DISK_TIMEOUT:g} s"
                raise DeadlineExceeded(f"the keeper of the images at {place} {words}")
        except ProcessLookupError:
            continue
        finally:
            os.close(pidfd)
