"""One dump of a running container: however the dump ends, the container resumes, unless `kill` ends it.

CRIU holds it frozen. If CRIU is killed, a guard keeps it frozen until the damage is repaired (freeze/guard.py).
"""

from __future__ import annotations

import os

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError
from criu_rpc.image_codec import forget_lock
from runtime.cgroups.cgroup import Cgroup
from runtime.checkpoint import supplement
from runtime.checkpoint.options import is_own_network
from runtime.errors import ContainerError, DeadlineExceeded, StateError
from runtime.freeze import mend, monitor_hold, network_lock
from runtime.freeze.guard import Guard
from runtime.lifecycle import control
from runtime.light import signals
from runtime.limits import DEATH_TIMEOUT
from runtime.linux import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from criu_rpc.client import DumpSession
    from criu_rpc.options import DumpOptions
    from runtime.spec.config import Spec
    from runtime.state.record import State


class Dump:
    """A context manager: leaving it before `finish` or `kill` resumes the container."""

    def __init__(
        self,
        state: State,
        spec: Spec,
        options: DumpOptions,
        *,
        timeout: float,
        guard: Guard | None = None,
        paused: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start CRIU, with `env` or this process's environment; the dump must be over within `timeout` seconds.

        `paused`: see mend.note. A `guard` that was started ahead is ready earlier; it is closed with the dump. Raises
        CriuError, ContainerError, with the container unchanged.
        """
        self._state, self._spec, self._options, self._paused = state, spec, options, paused
        self._cgroup = Cgroup.of(state)
        self._hold: monitor_hold.Hold | None = None
        self._session: DumpSession | None = None
        self._guarded = self._locked = self._killed = self._over = False
        self._shared = not spec.is_new("network")  # other containers may have locks there
        self._others = network_lock.locks(state.pid) if self._shared else []
        self._guard = guard or Guard(state)
        self._init = -1
        try:
            init = control.open_init(state)
            if init is None:
                raise ContainerError(f"container {state.id}: its init is gone")
            self._init = init
            mend.note(state, paused=paused, others=self._others)
            self._session = Criu().dump(options, timeout=timeout, env=env)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.roll_back()

    def run_until(self, *scripts: str) -> str:
        """Let CRIU continue to the first of the notifications, and return its name.

        CRIU freezes the container after `pre-dump` is answered. Raises CriuError, ContainerError.
        """
        assert self._session is not None
        if not self._guarded:
            self._session.run_until("pre-dump")
            self._guard.watch(self._session.process_id)
            self._guarded = True
            if "pre-dump" in scripts:
                return "pre-dump"
        unlocked = self._shared and not self._locked
        reached = self._session.run_until(*scripts, *(["query-ext-files"] if unlocked else [])).script
        if unlocked:
            lock = sorted(set(network_lock.locks(self._state.pid)).difference(self._others))
            mend.note(self._state, paused=self._paused, others=self._others, lock=lock)
            self._locked = True
        return reached if reached in scripts else self.run_until(*scripts)

    def complete(self, images: int, *, keep: bool = True) -> None:
        """At `post-dump`: complete CRIU's images in a directory, and hold the monitor.

        `keep`: connections in a shared network stay locked when the container is gone. Raises ContainerError,
        CriuError.
        """
        supplement.save(images, self._state, self._cgroup)
        if is_own_network(self._spec):
            forget_lock(images)
        self._hold = monitor_hold.complete(self._state, images)
        if not self._options.leave_running:
            network_lock.prepare(self._state, self._spec, images, keep=keep)

    def require_frozen(self) -> None:
        """Raise CriuError if CRIU has exited since its last message."""
        assert self._session is not None
        self._session.require_alive()

    def finish(self) -> None:
        """Have CRIU complete the dump: the container resumes or is gone, as the options say. Raises CriuError."""
        assert self._session is not None
        if self._options.leave_running and self._hold is not None:
            self._hold.release()
        self._session.finish()
        self._close()

    def kill(self, host: str | None = None, on_killed: Callable[[], None] = lambda: None, *, wait: bool = True) -> None:
        """Kill the frozen container. None of its processes executes another instruction of its program.

        CRIU holds every thread of it stopped, and the kernel marks a process as ending while SIGKILL is sent. Whatever
        makes its threads continue later (CRIU's answer or its death, a thaw of the cgroup), they only exit. Every
        process is sent a signal of its own, because init takes the others with it only when it exits. Init comes first:
        if this process is killed on the way, nothing of the container remains.

        Attached clients learn that it has moved to `host`. `on_killed` is called once its death is certain. The exit
        takes 50 ms for each GiB of memory; with `wait`, `reap` waits for it. Raises DeadlineExceeded.
        """
        if host is not None and self._hold is not None:
            self._hold.moved(host)
        self._killed = True
        self._send_kill()
        on_killed()
        if wait:
            self.reap()

    def _send_kill(self) -> None:
        """Send SIGKILL to every process of the container."""
        members = self._open_members()
        try:
            for pidfd in (self._init, *members):
                try:
                    signals.pidfd_send_signal(pidfd, signals.SIGKILL)
                except ProcessLookupError:
                    pass  # it is dead already
        finally:
            for pidfd in members:
                os.close(pidfd)

    def _open_members(self) -> list[int]:
        """Return pidfds of all processes of the container: those CRIU has stopped, and any other in its cgroup."""
        held: dict[int, int] = {}
        dead: set[int] = set()
        while True:
            members = processes.descendants(self._state.pid) | self._in_cgroup()
            # A pid that is listed after its pidfd was opened belongs to that process, or the process is dead.
            for pid in held.keys() - members:
                os.close(held.pop(pid))
            new = members - held.keys() - dead
            if not new:
                return list(held.values())
            for pid in new:
                try:
                    held[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    dead.add(pid)

    def _in_cgroup(self) -> set[int]:
        try:
            self._cgroup.require_own()
        except StateError:
            return set()  # its paths are damaged
        return set(self._cgroup.pids())

    def reap(self) -> None:
        """Wait until none of the processes of a killed container exists. Harmless when the dump is over.

        Raises DeadlineExceeded.
        """
        if self._over:
            return
        try:
            if self._session is not None:
                self._session.finish()
        except (CriuError, DeadlineExceeded):
            pass  # it misses the processes, or was killed
        if self._cgroup.frozen:  # by the guard: a process in the freezer does not die
            self._cgroup.signal(signals.SIGKILL)
            self._cgroup.thaw()
        try:
            if not processes.wait_exit(self._init, DEATH_TIMEOUT):
                raise DeadlineExceeded(
                    f"container {self._state.id}: its processes did not exit within {DEATH_TIMEOUT:g} s"
                )
        finally:
            self._close()

    def roll_back(self) -> None:
        """Resume the container as before, or `reap` it if it was killed. Harmless when the dump is over.

        Raises ContainerError (see mend.repair), DeadlineExceeded.
        """
        if self._killed:
            self.reap()
        if self._over:
            return
        if self._hold is not None:
            self._hold.release()
        if self._session is not None:
            self._session.abort()
        try:
            mend.repair(self._state)
        finally:
            self._close()

    def _close(self) -> None:
        self._over = True
        mend.forget(self._state)
        if self._session is not None:
            self._session.abort()
        self._guard.close()
        if self._cgroup.frozen and not self._paused:
            self._cgroup.thaw()  # CRIU was killed when it had done its work
        if self._hold is not None:
            self._hold.close()
        if self._init >= 0:
            os.close(self._init)


def pre_dump(state: State, options: DumpOptions, *, timeout: float, paused: bool) -> None:
    """Make one pre-dump; the container resumes in any case. Raises CriuError, ContainerError."""
    mend.note(state, paused=paused)
    try:
        Criu().pre_dump(options, timeout=timeout)
    except BaseException:
        mend.repair(state)
        raise
    mend.forget(state)
