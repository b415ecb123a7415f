"""The life of a container once it is there: start, kill, pause, delete. Every verb holds the container's lock.

What makes one is in create.py: engines call these verbs as often, and they need far less.
"""

from __future__ import annotations

import os
import select

from runtime import processes
from runtime.cgroups import Cgroup
from runtime.errors import Conflict, ContainerError, DeadlineExceeded, NotFound, StartFailed, StateError
from runtime.light import signals
from runtime.state import State, Status, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

START_TIMEOUT = 120.0
DEATH_TIMEOUT = 30.0
MONITOR_TIMEOUT = 10.0


def start(store: Store, container_id: str) -> State:
    """Let the init of a created container run its program."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "start", Status.CREATED)
        fifo, errors_fifo = (f"{store.directory(container_id)}/{name}.fifo" for name in ("exec", "error"))
        try:
            errors = os.open(errors_fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ContainerError(
                f"container {container_id}: its init does not wait any more: {error.strerror}"
            ) from None
        # Saved before init goes on: a program that ends at once must not be taken for one that was never started.
        state = state.replace(started=True)
        store.save(state)
        os.write(fd, b"0")
        os.close(fd)
        _await_program(errors)
        os.unlink(fifo)
        os.unlink(errors_fifo)
        _run_later(state, "poststart")
        return state


def _await_program(errors: int) -> None:
    """Wait until init has become the container's program. Raises StartFailed with init's own words, DeadlineExceeded.

    `errors` reads from a fifo that only init can write to: it is at its end when init's exec has closed it.
    """
    poll = select.poll()
    poll.register(errors, select.POLLIN)
    try:
        if not poll.poll(START_TIMEOUT * 1000):
            raise DeadlineExceeded(f"the container's init did not become its program within {START_TIMEOUT:g} s")
        words = os.read(errors, 1 << 16)
    finally:
        os.close(errors)
    if words:
        raise StartFailed(words.decode(errors="replace"))


def kill(store: Store, container_id: str, number: int, *, everyone: bool = False) -> None:
    """Send a signal to the container's init, or to all its processes.

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
        try:
            signals.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            raise Conflict(f"container not running: cannot kill {container_id}, it has stopped") from None
        finally:
            os.close(pidfd)
    if number == signals.SIGKILL and cgroup.frozen:
        cgroup.thaw()  # what a version 1 freezer holds does not die


def open_init(state: State) -> int | None:
    """A pidfd of the container's init; None when it is gone. A reused pid is not taken for it."""
    if not state.pid:
        return None
    try:
        pidfd = os.pidfd_open(state.pid)
    except OSError:
        return None
    if processes.start_time(state.pid) == state.pid_start_time:
        return pidfd
    os.close(pidfd)
    return None


def pause(store: Store, container_id: str) -> None:
    """Freeze all processes of a running container."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "pause", Status.RUNNING, Status.CREATED)
        Cgroup.of(state).freeze()


def resume(store: Store, container_id: str) -> None:
    """Let a paused container go on."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "resume", Status.PAUSED)
        Cgroup.of(state).thaw()


def update(store: Store, container_id: str, change: Callable[[Cgroup], None]) -> None:
    """Change the limits of a container that lives."""
    with store.lock_existing(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "update", Status.CREATED, Status.RUNNING, Status.PAUSED)
        change(Cgroup.of(state))


def delete(store: Store, container_id: str, *, force: bool = False, created: str | None = None) -> None:
    """Remove a stopped container; with `force` one in any status, and none at all is no error then.

    With `created` only the container that was created then: its id may be another's by now.
    """
    if not os.path.isdir(store.directory(container_id)):
        if force:
            store.forget(container_id)
            return
        raise NotFound(f"container does not exist: {container_id}")
    with store.lock(container_id):
        try:
            state = store.load(container_id)
            if created is not None and state.created != created:
                return
            cgroup = Cgroup.of(state)
            if cgroup.paths != state.cgroup_paths:
                Cgroup(state.cgroup_paths).require_own()
            cgroup.require_own()
        except (NotFound, StateError) as error:
            if not force:
                remedy = f"`pymigrate delete --force {container_id}` removes its directory, and nothing else"
                raise type(error)(str(error), remedy=remedy) from None
            store.remove(container_id)
            return
        if not force:
            state.status.require(container_id, "delete", Status.STOPPED, Status.CREATED)
        remove(store, state, cgroup)


def remove(store: Store, state: State, cgroup: Cgroup | None = None) -> None:
    """End what lives of a container and remove all of it. The caller holds its lock."""
    cgroup = cgroup or Cgroup.of(state)
    end(state, cgroup)
    cgroup.kill()
    if state.has_bridge:
        from runtime import veth

        veth.remove(state)  # with the namespace it would go by itself, but later
    wait_monitor(state, MONITOR_TIMEOUT)
    cgroup.remove()
    _run_later(state, "poststop", "stopped")
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
                cgroup.kill()
            if not processes.wait_exit(pidfd, DEATH_TIMEOUT):
                raise DeadlineExceeded(f"container {state.id}: process {state.pid} does not end")
    except ProcessLookupError:
        pass  # it has ended meanwhile
    finally:
        os.close(pidfd)


def wait_monitor(state: State, timeout: float) -> None:
    """Wait until the monitor has written all there is to write; end it if it does not by itself."""
    if not state.shim_pid:
        return
    try:
        pidfd = os.pidfd_open(state.shim_pid)
    except OSError:
        return
    try:
        if processes.start_time(state.shim_pid) == state.shim_start_time and not processes.wait_exit(pidfd, timeout):
            signals.pidfd_send_signal(pidfd, signals.SIGKILL)
            processes.wait_exit(pidfd, timeout)
    finally:
        os.close(pidfd)


def _run_later(state: State, point: str, status: str | None = None) -> None:
    if state.hooks.get(point):
        from runtime import hooks, notices
        from runtime.spec import Hook

        try:
            known = [Hook(**hook) for hook in state.hooks[point]]
        except TypeError:  # state.json is not as we wrote it
            notices.warn(f"hooks.{point}: state.json holds what is no hook")
            return
        hooks.run_all(point, known, state.oci(status))
