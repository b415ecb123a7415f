"""Signal, pause, resume and update an existing container. Every verb but `kill` holds the container's lock."""

from __future__ import annotations

import os

from runtime.cgroups.cgroup import Cgroup
from runtime.errors import Conflict
from runtime.light import signals
from runtime.linux import processes
from runtime.state.record import State
from runtime.state.status import Status
from runtime.state.store import DUMP, THROTTLE, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def kill(store: Store, container_id: str, number: int, *, everyone: bool = False) -> None:
    """Send a signal to the container's init, or to all its processes. SIGKILL kills all of them in any case.

    It does not wait for the container's lock, because the process that holds it may be waiting for the container.
    """
    state = store.load(container_id)
    cgroup = Cgroup.of(state)
    if everyone:
        # Even if init is gone: processes of a container in the host's pid namespace outlive it.
        cgroup.signal(number)
    else:
        state.status.require(container_id, "kill")
        pidfd = open_init(state)
        if pidfd is None:
            raise Conflict(f"container not running: cannot kill {container_id}, it has stopped")
        alone = number == signals.SIGKILL and not processes.is_first(state.pid)
        try:
            signals.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            raise Conflict(f"container not running: cannot kill {container_id}, it has stopped") from None
        finally:
            os.close(pidfd)
        if alone:
            cgroup.signal(number)  # the others would stay, and no process would end them
    if number == signals.SIGKILL and cgroup.frozen:
        cgroup.thaw()  # a process in a version 1 freezer does not die


def open_init(state: State) -> int | None:
    """Return a pidfd of the container's init; None if it is gone."""
    return processes.open_process(state.pid, state.pid_start_time)


def pause(store: Store, container_id: str) -> None:
    """Freeze all processes of a running container."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "pause")
        Cgroup.of(state).freeze()


def resume(store: Store, container_id: str) -> None:
    """Resume a paused container, or one whose dump was cut short."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        _unthrottle(state)
        if os.path.exists(f"{state.directory}/{DUMP}"):
            from runtime.freeze import mend

            mend.repair(state)
            if state.status is Status.RUNNING:
                return
        state.status.require(container_id, "resume")
        Cgroup.of(state).thaw()


def _unthrottle(state: State) -> None:
    """Give a container its own limit of processor time, if a move that was killed has left it throttled."""
    if os.path.exists(f"{state.directory}/{THROTTLE}"):
        from runtime.freeze import throttle

        throttle.restore_left(state)


def update(store: Store, container_id: str, resources: dict[str, Any], name: str) -> None:
    """Change the limits of a living container, and keep them in its state, so that they move with it.

    `resources` is a resources object as in config.json; errors call it `name`. Raises SpecError, ContainerError.
    """
    from runtime.spec.fields import Fields
    from runtime.spec.resources import merge, parse_resources

    parsed = parse_resources(Fields(resources, name))
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "update")
        _unthrottle(state)
        cgroup = Cgroup.of(state)
        cgroup.require_own()
        cgroup.apply(parsed)
        store.save(state.replace(resources=merge(state.resources, resources)))
