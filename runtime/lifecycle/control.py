"""The life of a container that is there: kill, pause, delete. Every verb but `kill` holds the container's lock.

What makes one is in lifecycle/create.py and lifecycle/start.py.
"""

from __future__ import annotations

import os

from runtime.cgroups.cgroup import Cgroup
from runtime.errors import Conflict, DeadlineExceeded, NotFound, StateError
from runtime.light import signals
from runtime.linux import processes
from runtime.state.store import DUMP, State, Status, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEATH_TIMEOUT = 30.0
MONITOR_TIMEOUT = 10.0


def kill(store: Store, container_id: str, number: int, *, everyone: bool = False) -> None:
    """Send a signal to the container's init, or to all its processes. With SIGKILL all end, in any case.

    It does not wait for the container's lock: whoever holds that may be waiting for the container.
    """
    state = store.load(container_id)
    cgroup = Cgroup.of(state)
    if everyone:
        # Also when init is gone: processes of a container in the host's pid namespace outlive it.
        cgroup.signal(number)
    else:
        state.status.require(container_id, "kill", Status.CREATED, Status.RUNNING, Status.PAUSED)
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
            cgroup.signal(number)  # the others would stay, with nobody to end them
    if number == signals.SIGKILL and cgroup.frozen:
        cgroup.thaw()  # what a version 1 freezer holds does not die


def open_init(state: State) -> int | None:
    """A pidfd of the container's init; None when it is gone."""
    return processes.open_process(state.pid, state.pid_start_time)


def pause(store: Store, container_id: str) -> None:
    """Freeze all processes of a running container."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "pause", Status.RUNNING)  # `start` would wait for one that is frozen
        Cgroup.of(state).freeze()


def resume(store: Store, container_id: str) -> None:
    """Let a paused container go on, or one whose dump was cut short."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        if os.path.exists(f"{store.directory(container_id)}/{DUMP}"):
            from runtime.freeze import mend

            mend.mend(state)
            if state.status is Status.RUNNING:
                return
        state.status.require(container_id, "resume", Status.PAUSED)
        Cgroup.of(state).thaw()


def update(store: Store, container_id: str, resources: dict[str, Any], name: str) -> None:
    """Change the limits of a container that lives, and keep them with its state: they go where it goes.

    `resources` is a resources object as in config.json, called `name` in errors. Raises SpecError, ContainerError.
    """
    from runtime.spec.fields import Fields
    from runtime.spec.resources import merge, parse_resources

    parsed = parse_resources(Fields(resources, name))
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "update", Status.CREATED, Status.RUNNING, Status.PAUSED)
        cgroup = Cgroup.of(state)
        cgroup.require_own()
        cgroup.apply(parsed)
        store.save(state.replace(resources=merge(state.resources, resources)))


def delete(store: Store, container_id: str, *, force: bool = False, created: str | None = None) -> None:
    """Remove a stopped container; with `force` one in any status, and none at all is no error then.

    With `created` only the container that was created then: its id may be another's by now.
    """
    if not os.path.isdir(store.directory(container_id)):
        if force:
            store.forget(container_id)
            return
        raise NotFound.of(container_id)
    with store.lock(container_id):
        try:
            state = store.load(container_id)
            if created is not None and state.created != created:
                return
            cgroup = Cgroup.of(state)
            cgroup.require_own()
        except (NotFound, StateError) as error:
            if force:
                store.remove(container_id)
                return
            if not os.path.isdir(store.directory(container_id)):
                raise  # another one was faster
            remedy = f"`pymigrate delete --force {container_id}` removes its directory, and nothing else"
            raise type(error)(str(error), remedy=remedy) from None
        if state.bundle_hints:
            from runtime.state import moved_mark

            moved_mark.require_not_returned(state)
        if not force:
            state.status.require(container_id, "delete", Status.STOPPED, Status.CREATED)
        remove(store, state, cgroup)


def remove(store: Store, state: State, cgroup: Cgroup | None = None) -> None:
    """End what lives of a container and remove all of it. The caller holds its lock."""
    cgroup = cgroup or Cgroup.of(state)
    store.drop(state.id, DUMP)  # nothing of a dump has to be undone any more
    end(state, cgroup)
    cgroup.kill()
    if state.has_bridge:
        from runtime.network import veth

        veth.remove(state)  # with the namespace it would go by itself, but later
    wait_monitor(state, MONITOR_TIMEOUT)
    cgroup.remove()
    if state.hooks.get("poststop"):
        from runtime.init import hooks

        hooks.run_later(state, "poststop", "stopped")
    store.remove(state.id)


def end(state: State, cgroup: Cgroup | None = None) -> None:
    """Kill a container's init, and with it its pid namespace, and wait until it is gone. Harmless when it is dead.

    With its `cgroup`, what is frozen in it is thawed to be able to die. Raises DeadlineExceeded.
    """
    pidfd = open_init(state)
    if pidfd is None:
        return
    try:
        if processes.is_alive(state.pid, state.pid_start_time):
            signals.pidfd_send_signal(pidfd, signals.SIGKILL)
            if cgroup is not None:
                cgroup.signal(signals.SIGKILL)
                if cgroup.frozen:
                    cgroup.thaw()  # what a version 1 freezer holds does not die
            if not processes.wait_exit(pidfd, DEATH_TIMEOUT):
                raise DeadlineExceeded(f"container {state.id}: process {state.pid} does not end")
    except ProcessLookupError:
        pass  # it has ended meanwhile
    finally:
        os.close(pidfd)


def wait_monitor(state: State, timeout: float) -> None:
    """Wait until the monitor has written all there is to write; end it if it does not by itself."""
    pidfd = processes.open_process(state.shim_pid, state.shim_start_time)
    if pidfd is None:
        return
    try:
        if not processes.wait_exit(pidfd, timeout):
            signals.pidfd_send_signal(pidfd, signals.SIGKILL)
            processes.wait_exit(pidfd, timeout)
    finally:
        os.close(pidfd)
