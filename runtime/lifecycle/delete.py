"""Delete a container, and kill its remaining processes."""

from __future__ import annotations

import os

from runtime.cgroups.cgroup import Cgroup
from runtime.errors import DeadlineExceeded, NotFound, StateError
from runtime.lifecycle.control import open_init
from runtime.light import signals
from runtime.limits import DEATH_TIMEOUT, MONITOR_EXIT_TIMEOUT
from runtime.linux import processes
from runtime.state.record import State
from runtime.state.store import DUMP, Store


def delete(store: Store, container_id: str, *, force: bool = False, created: str | None = None) -> None:
    """Remove a stopped container; with `force` one in any status, without an error if it does not exist.

    With `created`, only the container that was created at that time: another one may have its id by now.
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
                raise  # another process has removed it
            remedy = f"`pymigrate delete --force {container_id}` removes its directory, and nothing else"
            raise type(error)(str(error), remedy=remedy) from None
        if state.bundle_hints:
            from runtime.state import moved_mark

            moved_mark.require_not_returned(state)
        if not force:
            state.status.require(container_id, "delete")
        remove(store, state, cgroup)


def remove(store: Store, state: State, cgroup: Cgroup | None = None) -> None:
    """Kill a container's processes and remove everything of it. The caller holds its lock."""
    cgroup = cgroup or Cgroup.of(state)
    store.drop(state.id, DUMP)  # a dump no longer has to be undone
    end(state, cgroup)
    cgroup.kill()
    if state.has_bridge:
        from runtime.network import veth

        veth.remove(state)  # it would vanish with the namespace, but later
    wait_monitor(state, MONITOR_EXIT_TIMEOUT)
    cgroup.remove()
    if state.hooks.get("poststop"):
        from runtime.init import hooks

        hooks.run_later(state, "poststop", "stopped")
    store.remove(state.id)


def end(state: State, cgroup: Cgroup | None = None) -> None:
    """Kill a container's init, and with it its pid namespace, and wait until it is gone. Harmless when it is dead.

    With its `cgroup`, frozen processes are thawed so that they can die. Raises DeadlineExceeded.
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
                    cgroup.thaw()  # a process in a version 1 freezer does not die
            if not processes.wait_exit(pidfd, DEATH_TIMEOUT):
                late = f"process {state.pid} did not exit within {DEATH_TIMEOUT:g} s"
                raise DeadlineExceeded(f"container {state.id}: {late}")
    except ProcessLookupError:
        pass  # it has exited meanwhile
    finally:
        os.close(pidfd)


def wait_monitor(state: State, timeout: float) -> None:
    """Wait until the monitor has written everything and exited; kill it if it does not exit in `timeout` seconds."""
    pidfd = processes.open_process(state.monitor_pid, state.monitor_start_time)
    if pidfd is None:
        return
    try:
        if not processes.wait_exit(pidfd, timeout):
            signals.pidfd_send_signal(pidfd, signals.SIGKILL)
            processes.wait_exit(pidfd, timeout)
    finally:
        os.close(pidfd)
