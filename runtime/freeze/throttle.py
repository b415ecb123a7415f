"""Give a container less processor time for a while, and its own limit back, whoever is killed meanwhile.

throttle.json in the container's directory has the container's own limit while another one is in force. The process that
throttles restores it. If that process is killed, a watcher sees the pipe between them close and does it; if the watcher
is killed as well, the next verb that would dump or update the container does it, or `recover`, or `resume`.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from criu_rpc.errors import Error
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.quota import Quota, file_of, used
from runtime.errors import DeadlineExceeded, unwritable
from runtime.light import json as light_json
from runtime.limits import GUARD_EXIT_TIMEOUT, THROTTLE_LOCK_TIMEOUT
from runtime.linux import files, processes, selfexec
from runtime.state.store import THROTTLE, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from runtime.state.record import State

# Percents of the processor time that it used before; QEMU's cpu-throttle-initial, cpu-throttle-increment and
# max-cpu-throttle have the same defaults.
INITIAL, INCREMENT, MOST = 20, 10, 99


class Throttle:
    """The throttle of one container, which its caller has locked. `percent` of its processor time is taken away.

    Until the first `tighten` it only looks how much the container uses.
    """

    def __init__(self, state: State) -> None:
        """Raises ContainerError if the container cannot be throttled."""
        self._state, self._paths = state, Cgroup.of(state).paths
        self._quota = Quota.of(self._paths)
        self._began, self._used = time.monotonic(), used(self._paths)
        self._busy = 0.0  # processors in use without a throttle
        self._watcher, self._pipe = 0, -1
        self.percent = 0

    def tighten(self) -> bool:
        """Take one step. Return False if there is none left. Raises ContainerError; then nothing has changed."""
        if self.percent >= MOST:
            return False
        if not self.percent:
            self._begin()
        percent = min(MOST, self.percent + INCREMENT) if self.percent else INITIAL
        self._quota.set(self._busy * (100 - percent) / 100)
        self.percent = percent
        return True

    def _begin(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-3)
        self._busy = (used(self._paths) - self._used) / seconds
        if self._quota.processors is not None:
            self._busy = min(self._busy, self._quota.processors)
        if not self._watcher:
            self._watcher, self._pipe = _watch(self._state)
        path = _note(self._state)
        try:
            files.replace(path, light_json.dumps({"own": self._quota.own}).encode())
        except OSError as error:
            raise unwritable(path, error) from None

    def lift(self) -> None:
        """Give the container its own limit back. May be repeated. Raises ContainerError."""
        if self.percent:
            restore_left(self._state)
            self.percent = 0

    def close(self) -> None:
        """End everything. Raises ContainerError."""
        try:
            self.lift()
            forget(self._state)
        finally:
            self._end_watcher()

    def _end_watcher(self) -> None:
        if not self._watcher:
            return
        os.close(self._pipe)
        if is_left(self._state):
            return  # it tries again, as soon as the caller has given up the container's lock
        processes.end_child(self._watcher, GUARD_EXIT_TIMEOUT)
        self._watcher = 0


def is_left(state: State) -> bool:
    """Return whether a container is throttled, or was left so."""
    return os.path.exists(_note(state))


def restore_left(state: State) -> bool:
    """Give a container its own limit back if it was left throttled; return whether it was. The caller holds its lock.

    Raises ContainerError.
    """
    try:
        with open(_note(state), "rb") as file:
            own = light_json.loads(file.read())["own"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        own = None
    if isinstance(own, str):
        Quota(file_of(Cgroup.of(state).paths), own, 0).restore()
    forget(state)
    return True


def forget(state: State) -> None:
    """Remove throttle.json."""
    try:
        os.unlink(_note(state))
    except FileNotFoundError:
        pass


def _note(state: State) -> str:
    return f"{state.directory}/{THROTTLE}"


def _watch(state: State) -> tuple[int, int]:
    """Start a watcher. Return its pid, and the end of the pipe whose closing makes it act."""
    reader, writer = os.pipe()
    try:
        argv = selfexec.command("runtime.freeze.throttle", state.directory)
        actions = [
            (os.POSIX_SPAWN_DUP2, reader, 0),
            *((os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (1, 2)),
        ]
        return os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsid=True), writer
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)


def main(argv: list[str]) -> NoReturn:
    """Run the watcher. argv: the container's state directory. The pipe is descriptor 0."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    root, container_id = os.path.split(argv[0])
    try:
        _restore(Store(root), container_id)
    except (Error, OSError):
        os._exit(1)  # the container was deleted meanwhile
    os._exit(0)


def _restore(store: Store, container_id: str) -> None:
    """Restore the limit in place of the process that has throttled the container and was killed."""
    deadline = time.monotonic() + THROTTLE_LOCK_TIMEOUT
    while is_left(store.load(container_id)) and time.monotonic() < deadline:
        try:
            with store.lock_existing(container_id, 0):
                restore_left(store.load(container_id))
        except DeadlineExceeded:
            time.sleep(0.01)  # another verb holds the lock: it restores the limit itself, or removes the container


if __name__ == "__main__":
    main(sys.argv[1:])
