"""The life of a container: create, start, kill, delete. Every verb that changes one holds its lock."""

from __future__ import annotations

import os
import time

from runtime import hooks, init, monitor, namespaces, processes, sync, syscalls
from runtime.cgroups import Cgroup
from runtime.errors import Conflict, ContainerError, DeadlineExceeded, NotFound, SpecError, StartFailed, StateError
from runtime.light import signals
from runtime.records import Record
from runtime.resources import Resources
from runtime.state import State, Status, Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from runtime.spec import Spec

CREATE_TIMEOUT = 60.0
DEATH_TIMEOUT = 30.0
MONITOR_TIMEOUT = 10.0
LATER = ("poststart", "poststop")


class Options(Record):
    """How a container is created, beside its bundle; what the flags of `create` and `run` say.

    `foreground` is for a caller that stays: the container gets its standard streams, and is its child.
    """

    pid_file: str | None = None
    console_socket: str | None = None
    pidfd_socket: str | None = None
    preserve_fds: int = 0
    no_pivot: bool = False
    no_new_keyring: bool = False
    systemd: bool = False
    foreground: bool = False


def create(
    store: Store,
    container_id: str,
    bundle: str,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    console: socket.socket | None = None,
) -> State:
    """Make a container of a bundle; its init waits for `start`.

    `console` takes the master of its terminal, where there is no --console-socket. Raises SpecError, Conflict,
    StartFailed; after a failure nothing of it is left. Must be called by a process without threads.
    """
    from runtime.spec import load

    bundle = os.path.abspath(bundle)
    with store.lock(container_id):
        spec = load(bundle)
        _check(spec, options, console)
        directory = store.create(container_id)
        state = State(
            id=container_id,
            bundle=bundle,
            rootfs=os.path.realpath(spec.root),
            created=now(),
            log_path=directory + "/log",
            annotations=spec.annotations,
            hooks=later_hooks(spec),
        )
        cgroup = Cgroup({})
        try:
            state, cgroup = make_cgroup(store, state, spec, systemd=options.systemd)
            return _launch(store, state, spec, cgroup, options, console)
        except BaseException:
            remove_cgroup(cgroup)
            _run_later(state, "poststop", "stopped")
            store.remove(container_id)
            raise


def make_cgroup(store: Store, state: State, spec: Spec, *, systemd: bool) -> tuple[State, Cgroup]:
    """Make a new container's cgroup and set its limits; the state says where it is. Raises ContainerError.

    The state is saved before anything is made, so that whoever finds it after we were killed can remove all.
    """
    if os.geteuid() and spec.resources == Resources():
        store.save(state)  # without privileges, and without limits to set, there is none
        return state, Cgroup({})
    if not systemd:
        planned = Cgroup.planned(state.id, spec.cgroups_path)
        Cgroup(planned).require_free()  # what is in there must not become this container's, to be killed with it
        state = state.replace(cgroup_paths=planned)
        store.save(state)
        cgroup = Cgroup.create(state.id, spec.cgroups_path)
    else:
        store.save(state)
        cgroup = Cgroup.create(
            state.id, spec.cgroups_path, systemd=True, resources=spec.resources, annotations=spec.annotations
        )  # fmt: skip
        state = state.replace(cgroup_paths=cgroup.paths, systemd_unit=cgroup.unit)
        store.save(state)
    try:
        cgroup.apply(spec.resources)
    except BaseException:
        remove_cgroup(cgroup)
        raise
    return state, cgroup


def remove_cgroup(cgroup: Cgroup) -> None:
    """After a failure, which says more than one of these would."""
    try:
        cgroup.kill()
        cgroup.remove()
    except ContainerError:
        pass


def now() -> str:
    """The time, as runc writes it into states: UTC, to the nanosecond."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def _check(spec: Spec, options: Options, console: socket.socket | None) -> None:
    """What can be said before anything is made."""
    if not os.path.isdir(spec.root):
        raise StartFailed(f"root.path: {spec.root} is no directory")
    if spec.process.terminal and console is None and options.console_socket is None:
        raise SpecError(
            "cannot allocate tty if pymigrate will detach without setting console socket",
            remedy="set process.terminal to false, give --console-socket, or use `run` without --detach",
        )
    if options.console_socket is not None and not spec.process.terminal:
        raise SpecError("cannot use console socket if pymigrate will not detach or allocate tty: terminal is false")
    if spec.process.apparmor_profile or spec.process.selinux_label or spec.mount_label:
        from runtime.process import require_labels

        require_labels(spec.process, spec.mount_label)


def _launch(
    store: Store, state: State, spec: Spec, cgroup: Cgroup, options: Options, console: socket.socket | None
) -> State:
    """Start the init, go through the handshake, save the state as created."""
    directory = store.directory(state.id)
    fifo = directory + "/exec.fifo"
    os.mkfifo(fifo, 0o600)
    ours, theirs = sync.pair()
    (out_r, out_w), (err_r, err_w) = ((-1, -1),) * 2 if options.foreground else (os.pipe(), os.pipe())
    setup = init.Setup(
        spec=spec,
        cgroups=state.cgroup_paths,
        fifo=fifo,
        state=state.oci("creating"),
        stdio=(0, 1, 2),
        keep=options.preserve_fds,
        filter=compile_filter(spec),
        keyring=None if options.no_new_keyring else f"_ses.{state.id}",
        move_root=options.no_pivot,
    )
    keeper: monitor.Monitor | None = None
    adopted: int | None = None
    pid = 0
    try:
        terminal = console
        if options.console_socket is not None:
            terminal = connect_console(options.console_socket)
        if terminal is not None:
            setup = setup.replace(console=terminal.fileno())
        if options.foreground:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
            adopted = os.fork()
            if adopted == 0:
                init.become(setup, theirs)
            stdio = _streams(0, 1, 2)
        else:
            keeper = monitor.spawn(
                directory,
                lambda own: init.become(setup if own else setup.replace(stdio=(None, out_w, err_w)), theirs),
                stdout=out_r, stderr=err_r, adoptable=True,
            )  # fmt: skip
            stdio = ("/dev/null", *_streams(out_w, err_w)) if keeper.pid else _streams(0, 1, 2)
            if keeper.pid:
                cgroup.add_monitor(keeper.pid)
        theirs.close()
        for fd in (out_r, out_w, err_r, err_w):
            if fd >= 0:
                os.close(fd)
        shim = keeper.pid if keeper is not None else 0
        state = state.replace(
            shim_pid=shim, shim_start_time=processes.start_time(shim) if shim else None, stdio=stdio,
        )  # fmt: skip
        message = _receive(ours, spec)
        pid = int(message["pid"])
        cgroup.occupied()
        if adopted:
            os.waitpid(adopted, 0)
        state = state.replace(
            pid=pid, pid_start_time=processes.start_time(pid), namespace_paths=namespaces.paths(pid)
        )  # fmt: skip
        store.save(state)
        for point in ("prestart", "createRuntime"):
            hooks.run(point, spec.hooks[point], state.oci("creating"))
        sync.send(ours, {})
        await_ready(ours, spec, pid, state.oci("creating"), "the container's init")
        if keeper is not None:
            keeper.watch(pid)
        if options.pidfd_socket is not None:
            send_pidfd(options.pidfd_socket, pid)
        if options.pid_file is not None:
            write_pid(options.pid_file, pid)
        return state
    except BaseException:
        if pid:
            _kill(pid)
        if keeper is not None and keeper.pid:
            keeper.abandon()
        raise
    finally:
        ours.close()


def _receive(ours: socket.socket, spec: Spec) -> dict[str, Any]:
    """The message with the init's pid; the maps of a user namespace are written on the way."""
    message = sync.receive(ours, CREATE_TIMEOUT, "the container's init")
    if "map" in message:
        from runtime import idmaps

        idmaps.write(int(message["map"]), spec.uid_mappings, spec.gid_mappings)
        sync.send(ours, {})
        message = sync.receive(ours, CREATE_TIMEOUT, "the container's init")
    return message


def await_ready(ours: socket.socket, spec: Spec, pid: int, state: dict[str, Any], what: str) -> None:
    """Wait until the other side, process `pid`, is set up; a listener of its filter goes to the bundle's agent.

    `state` is the container's, as the specification has it.
    """
    message = sync.receive(ours, CREATE_TIMEOUT, what)
    if "listener" in message and spec.seccomp is not None:
        from runtime import seccomp_load

        agent = spec.seccomp.listener_path or ""
        fd = seccomp_load.take_listener(pid, int(message["listener"]))
        try:
            seccomp_load.send_listener(agent, fd, pid, state, metadata=spec.seccomp.listener_metadata)
        finally:
            os.close(fd)
        sync.send(ours, {})
        sync.receive(ours, CREATE_TIMEOUT, what)


def compile_filter(spec: Spec) -> Any:
    """The seccomp filter of a bundle for the process that loads it; None without one. Raises NotSupported."""
    if spec.seccomp is None:
        return None
    from runtime import seccomp_filter
    from runtime.process import Filter

    return Filter(seccomp_filter.compile(spec.seccomp), spec.seccomp.load_flags, spec.seccomp.notifies)


def connect_console(path: str) -> socket.socket:
    """A connection to a --console-socket. Raises StartFailed."""
    try:
        return sync.connect(path)
    except OSError as error:
        raise StartFailed(f"--console-socket {path}: {error.strerror}") from None


def _streams(*fds: int) -> Any:
    """What /proc shows of our descriptors; "" for one that is closed."""
    found = []
    for fd in fds:
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            found.append("")
    return tuple(found)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signals.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended by itself


def write_pid(path: str, pid: int) -> None:
    """Write a pid file, whole or not at all. Raises ContainerError."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(str(pid))
        os.rename(temporary, path)
    except OSError as error:
        raise ContainerError(f"{path}: cannot be written: {error.strerror}") from None


def send_pidfd(path: str, pid: int) -> None:
    """Send a pidfd of the container's init to the Unix socket at `path`. Raises ContainerError."""
    try:
        fd = os.pidfd_open(pid)
        try:
            sync.send_fd(path, fd, b"pidfd")
        finally:
            os.close(fd)
    except OSError as error:
        raise ContainerError(f"--pidfd-socket {path}: {error.strerror}") from None


def start(store: Store, container_id: str) -> State:
    """Let the init of a created container run its program."""
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "start", Status.CREATED)
        fifo = store.directory(container_id) + "/exec.fifo"
        try:
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
        os.unlink(fifo)
        _run_later(state, "poststart")
        return state


def kill(store: Store, container_id: str, number: int, *, everyone: bool = False) -> None:
    """Send a signal to the container's init, or to all its processes."""
    with store.lock(container_id):
        state = store.load(container_id)
        if everyone:
            # Also when init is gone: processes of a container in the host's pid namespace outlive it.
            for pid in Cgroup(state.cgroup_paths, state.systemd_unit).pids():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            return
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
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "pause", Status.RUNNING, Status.CREATED)
        Cgroup(state.cgroup_paths, state.systemd_unit).freeze()


def resume(store: Store, container_id: str) -> None:
    """Let a paused container go on."""
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "resume", Status.PAUSED)
        Cgroup(state.cgroup_paths, state.systemd_unit).thaw()


def update(store: Store, container_id: str, change: Callable[[Cgroup], None]) -> None:
    """Change the limits of a container that lives."""
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "update", Status.CREATED, Status.RUNNING, Status.PAUSED)
        change(Cgroup(state.cgroup_paths, state.systemd_unit))


def delete(store: Store, container_id: str, *, force: bool = False) -> None:
    """Remove a stopped container; with `force` one in any status, and none at all is no error then."""
    if not os.path.isdir(store.directory(container_id)):
        if force:
            return
        raise NotFound(f"container does not exist: {container_id}")
    with store.lock(container_id):
        try:
            state = store.load(container_id)
        except (NotFound, StateError):
            if not force:
                raise
            store.remove(container_id)
            return
        if not force:
            state.status.require(container_id, "delete", Status.STOPPED, Status.CREATED)
        remove(store, state)


def remove(store: Store, state: State) -> None:
    """End what lives of a container and remove all of it. The caller holds its lock."""
    cgroup = Cgroup(state.cgroup_paths, state.systemd_unit)
    end(state, cgroup)
    cgroup.kill()
    wait_monitor(state, MONITOR_TIMEOUT)
    cgroup.remove()
    try:
        _run_later(state, "poststop", "stopped")
    except TypeError:
        pass  # an odd state must not keep a container from being deleted
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


def later_hooks(spec: Spec) -> dict[str, Any]:
    """For the state: the hooks that are run when the bundle may be gone."""
    return {point: [hook.plain() for hook in spec.hooks[point]] for point in LATER if spec.hooks[point]}


def _run_later(state: State, point: str, status: str | None = None) -> None:
    if state.hooks.get(point):
        from runtime.spec import Hook

        hooks.run_all(point, [Hook(**hook) for hook in state.hooks[point]], state.oci(status))


def exit_status(store: Store, container_id: str) -> int | None:
    """How the container's init ended: its exit status, 128 + n for signal n, None when that was not recorded."""
    from runtime import jsonio

    try:
        with open(store.directory(container_id) + "/exit.json", "rb") as file:
            return int(jsonio.loads(file.read())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
