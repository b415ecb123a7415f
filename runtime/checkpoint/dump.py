"""One dump of a running container: whatever ends it, the container goes on as before, unless it is ended here.

CRIU holds it frozen; a guard sees to it that it stays so when CRIU is killed, until that is mended (freeze/guard.py).
"""

from __future__ import annotations

import os

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError
from runtime.cgroups.cgroup import Cgroup
from runtime.checkpoint import supplement
from runtime.errors import ContainerError, DeadlineExceeded
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
    """A context manager: leaving it before `finish` or `kill` has the container go on."""

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
        """Start CRIU, in `env` or our environment; the dump must be over within `timeout` seconds.

        `paused`: see undump.begin. A `guard` that was started ahead is ready earlier; it is closed with the dump.
        Raises CriuError, ContainerError; nothing has happened then.
        """
        self._state, self._spec, self._options, self._paused = state, spec, options, paused
        self._cgroup = Cgroup.of(state)
        self._hold: monitor_hold.Hold | None = None
        self._session: DumpSession | None = None
        self._guarded = self._locked = self._over = False
        self._shared = not spec.is_new("network")  # where others may have made a lock of theirs
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
        """Let CRIU go on up to the first of the notifications; the container is frozen from `pre-dump` on.

        Returns which it is. Raises CriuError, ContainerError.
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
        """At `post-dump`: make CRIU's images in a directory complete, and hold the monitor.

        Connections in a network of others are to stay locked when the container is gone, if they `keep`. Raises
        ContainerError, CriuError.
        """
        supplement.save(images, self._state, self._cgroup)
        self._hold = monitor_hold.complete(self._state, images)
        if not self._options.leave_running:
            network_lock.prepare(self._state, self._spec, images, keep=keep)

    def require_frozen(self) -> None:
        """Raise CriuError when CRIU has ended since it was last heard of."""
        assert self._session is not None
        self._session.require_alive()

    def finish(self) -> None:
        """CRIU brings it to its end: the container goes on, or is gone, as the options say. Raises CriuError."""
        assert self._session is not None
        if self._options.leave_running and self._hold is not None:
            self._hold.release()
        self._session.finish()
        self._close()

    def kill(self, host: str | None = None, on_killed: Callable[[], None] = lambda: None) -> None:
        """End the frozen container: when this returns, none of its processes exists any more.

        It is killed before CRIU is answered, so that it cannot run again even if CRIU or we die now. Who is attached is
        told that it has moved to `host`. `on_killed` is called once its end is certain. Raises DeadlineExceeded.
        """
        if host is not None and self._hold is not None:
            self._hold.moved(host)
        try:
            signals.pidfd_send_signal(self._init, signals.SIGKILL)
        except ProcessLookupError:
            pass  # somebody else has
        on_killed()
        try:
            if self._session is not None:
                self._session.finish()
        except (CriuError, DeadlineExceeded):
            pass  # it misses them, or was killed
        if self._cgroup.frozen:  # by the guard: what the freezer holds does not die
            self._cgroup.signal(signals.SIGKILL)
            self._cgroup.thaw()
        if not processes.wait_exit(self._init, DEATH_TIMEOUT):
            raise DeadlineExceeded(f"container {self._state.id}: its processes do not end here")
        self._close()

    def roll_back(self) -> None:
        """The container goes on as before. Harmless when the dump is over. Raises ContainerError: see undump.mend."""
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
    """One pre-dump; the container goes on in any case. Raises CriuError, ContainerError."""
    mend.note(state, paused=paused)
    try:
        Criu().pre_dump(options, timeout=timeout)
    except BaseException:
        mend.repair(state)
        raise
    mend.forget(state)
