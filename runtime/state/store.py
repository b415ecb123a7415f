"""The files of the containers of this host, and their locks.

<root>/<id>/        0700
    state.json      0600, replaced atomically
    exec.fifo       between create and start: init waits on it
    error.fifo      likewise: init reports errors after `start` there
    config.json     a copy of the bundle's, made with the container
    exit.json       once init has exited, if pymigrate's monitor has seen it
    dump.json       during a dump, and after one that was cut short (freeze/mend.py)
    throttle.json   while a move gives it less processor time (freeze/throttle.py)
    memory-left     while memory is not all in place (lazy.py)
    attach          the socket of pymigrate's monitor (monitor/clients.py)
    log, log.0      its output on this host: the newest, and the older part that was put aside
    log.1           its output on earlier hosts
<root>/.<id>.lock   taken by every verb that changes the container

<root> is in /run: its contents end with the machine, as the containers do, so nothing waits for a disk (fsync).
"""

from __future__ import annotations

import fcntl
import os
import time

from runtime.errors import Conflict, ContainerError, DeadlineExceeded, NotFound, StateError, unwritable
from runtime.light import json as light_json
from runtime.limits import CONTAINER_LOCK_TIMEOUT
from runtime.linux import trusted
from runtime.state.record import OCI_VERSION, State, check_id, parse
from runtime.state.status import Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

THROTTLE = "throttle.json"  # in a container's directory: its own limit of processor time (freeze/throttle.py)
DUMP = "dump.json"  # in a container's directory: a dump is running, or was left unfinished (freeze/mend.py)


_FILES = (
    "state.json",
    "config.json",
    "exec.fifo",
    "error.fifo",
    "exit.json",
    DUMP,
    THROTTLE,
    "log",
    "attach",
    "memory-left",
)


class Store:
    """The containers of one root directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.fspath(root)
        self._is_trusted = False

    def _require_own(self) -> None:
        """Raise StateError if another user could have written the states: they hold hooks, pids and cgroups."""
        if not self._is_trusted:
            _require_own(self.root)
            self._is_trusted = os.path.isdir(self.root)

    def directory(self, container_id: str) -> str:
        """Return the directory of a container's files. Raises InvalidId, StateError."""
        self._require_own()
        return os.path.join(self.root, check_id(container_id))

    def ids(self) -> list[str]:
        self._require_own()
        try:
            return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != ".")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ContainerError(f"--root {self.root}: cannot be read: {error.strerror}") from None

    def load(self, container_id: str) -> State:
        """Return the state of a container that a verb acts on.

        Raises NotFound, StateError, and Conflict for a container that is being moved here.
        """
        state = self.look(container_id)
        state.require_here()
        return state

    def look(self, container_id: str) -> State:
        """Return the state of a container, even if it is still being moved here. Raises NotFound, StateError."""
        path = self.directory(container_id) + "/state.json"
        remedy = f"`pymigrate delete --force {container_id}` removes what is left"
        try:
            with open(path, "rb") as file:
                value = light_json.loads(file.read())
        except FileNotFoundError:
            raise NotFound.of(container_id) from None
        except OSError as error:
            raise StateError(f"{path}: cannot be read: {error.strerror}", remedy=remedy) from None
        except (ValueError, RecursionError) as error:
            raise StateError(f"{path}: is not JSON: {error}", remedy=remedy) from None
        return parse(value, path, container_id, remedy)

    def save(self, state: State) -> None:
        """Replace state.json. Raises ContainerError."""
        from runtime.linux import files

        path = self.directory(state.id) + "/state.json"
        try:
            files.replace(path, light_json.dumps({"ociVersion": OCI_VERSION, **state.plain()}).encode())
        except OSError as error:
            raise unwritable(path, error) from None

    def create(self, container_id: str) -> str:
        """Make the directory of a new container, and return it. Raises Conflict when the id is in use."""
        directory = self.directory(container_id)
        try:
            if not self._is_trusted:
                make_root(self.root)
            os.mkdir(directory, 0o700)
        except FileExistsError:
            raise Conflict(
                f"container with given ID already exists: {container_id}",
                remedy=f"choose another id, or `pymigrate delete {container_id}`",
            ) from None
        except OSError as error:
            raise ContainerError(f"{directory}: cannot be made: {error.strerror}") from None
        return directory

    def drop(self, container_id: str, name: str) -> None:
        """Remove one of a container's files; harmless if it does not exist."""
        try:
            os.unlink(os.path.join(self.directory(container_id), name))
        except FileNotFoundError:
            pass

    def remove(self, container_id: str) -> None:
        """Remove a container's directory with pymigrate's files in it; harmless when it is gone.

        Raises ContainerError if it holds other files: with a wrong --root the directory is not a container's.
        """
        directory = self.directory(container_id)
        try:
            for name in os.listdir(directory):
                if name.removeprefix(".").startswith(_FILES):
                    os.unlink(os.path.join(directory, name))
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ContainerError(
                f"{directory}: cannot be removed: {error.strerror}", remedy="is it a container's? look at its files"
            ) from None

    def status(self, state: State) -> Status:
        """Return the status for a bystander: a container that another process is making has not stopped."""
        return Status.CREATING if not state.pid and self.is_busy(state.id) else state.status

    def is_busy(self, container_id: str) -> bool:
        """Return True if a process holds the container's lock: its files may be half made, or half removed."""
        try:
            fd = os.open(os.path.join(self.root, f".{check_id(container_id)}.lock"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def lock_existing(self, container_id: str, timeout: float = CONTAINER_LOCK_TIMEOUT) -> Lock:
        """Return the lock of an existing container. Raises NotFound, without making a lock file."""
        if not os.path.isdir(self.directory(container_id)):
            raise NotFound.of(container_id)
        return self.lock(container_id, timeout)

    def forget(self, container_id: str) -> None:
        """Remove the lock file that a killed process has left of a container that does not exist."""
        if os.path.exists(os.path.join(self.root, f".{check_id(container_id)}.lock")):
            with self.lock(container_id):
                pass

    def lock(self, container_id: str, timeout: float = CONTAINER_LOCK_TIMEOUT) -> Lock:
        """Return the container's lock, to be held in a `with`; the kernel releases it if this process dies.

        Entering raises DeadlineExceeded when another process holds it for `timeout` seconds.
        """
        return Lock(self, container_id, timeout)


def _require_own(root: str) -> None:
    try:
        trusted.require(root)
    except OSError as error:
        raise StateError(
            f"--root {root}: {error.filename} {error.strerror}",
            remedy="name a directory that only you can change, and whose parents only you can change",
        ) from None


def make_root(root: str) -> None:
    """Make the state directory, parents included. Raises ContainerError, StateError."""
    try:
        os.makedirs(root, 0o700, exist_ok=True)
    except OSError as error:
        raise ContainerError(f"--root {root}: cannot be made: {error.strerror}") from None
    _require_own(root)  # another user may have made it meanwhile


class Lock:
    """See Store.lock."""

    def __init__(self, store: Store, container_id: str, timeout: float) -> None:
        self._directory = store.directory(container_id)
        self._id, self._root, self._timeout = container_id, store.root, timeout
        self._path = f"{store.root}/.{container_id}.lock"
        self._fd = -1

    def __enter__(self) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                make_root(self._root)
                continue
            except OSError as error:
                raise ContainerError(f"{self._path}: cannot be opened: {error.strerror}") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same(fd, self._path):
                    self._fd = fd
                    return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise DeadlineExceeded(
                        f"container {self._id} is busy: another pymigrate process is working on it",
                        remedy=f"is it being moved? `pymigrate kill {self._id} KILL` does not wait",
                    ) from None
                time.sleep(0.005)
            os.close(fd)

    def __exit__(self, *_: object) -> None:
        if not os.path.exists(self._directory):
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass  # another process has removed it
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # a process forked meanwhile may still have the descriptor
        os.close(self._fd)


def _is_same(fd: int, path: str) -> bool:
    """Return True if the locked file is still the one at `path`: its last holder may have removed it."""
    try:
        there, ours = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
