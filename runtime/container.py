"""The life of a container: create, start, exec, kill, delete. Every verb that changes one holds its lock."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import hooks, namespaces, processes, selfexec, shim, sync
from runtime.cgroups import Cgroup
from runtime.errors import Conflict, ContainerError, DeadlineExceeded, NotFound, NotSupported, StartFailed, StateError
from runtime.spec import Process, Spec, load
from runtime.state import State, Status, Store

if TYPE_CHECKING:
    import subprocess

CREATE_TIMEOUT = 60.0
DEATH_TIMEOUT = 30.0
MONITOR_TIMEOUT = 10.0


def create(
    store: Store, container_id: str, bundle: Path, *, pid_file: Path | None = None, tee: Sequence[int] = ()
) -> State:
    """Make a container of a bundle; its init waits for `start`.

    `tee` may hold two descriptors that get copies of its stdout and stderr. Raises SpecError, Conflict, StartFailed;
    after a failure nothing of it is left.
    """
    bundle = bundle.absolute()
    with store.lock(container_id):
        spec = load(bundle)
        _refuse_unsupported(spec)
        if not spec.root.is_dir():
            raise StartFailed(f"root.path: {spec.root} is no directory")
        directory = store.create(container_id)
        state = State(
            id=container_id,
            bundle=str(bundle),
            rootfs=str(spec.root.resolve()),
            created=datetime.now(UTC).isoformat(),
            log_path=str(directory / "log"),
            annotations=spec.annotations,
        )
        cgroup: Cgroup | None = None
        try:
            store.save(state)
            cgroup = Cgroup.create(container_id, spec.cgroups_path)
            state = dataclasses.replace(state, cgroup_paths=cgroup.paths)
            store.save(state)
            cgroup.apply(spec.resources)
            state = _launch(store, state, spec, tee)
            if pid_file is not None:
                _write_pid(pid_file, state.pid)
            return state
        except BaseException:
            if cgroup is not None:
                cgroup.kill()
                with contextlib.suppress(ContainerError):
                    cgroup.remove()
            store.remove(container_id)
            raise


def _refuse_unsupported(spec: Spec) -> None:
    if spec.process.terminal:
        raise NotSupported(
            "config.json: process.terminal: a terminal is not implemented yet", remedy="set process.terminal to false"
        )
    if spec.seccomp:
        raise NotSupported(
            "config.json: linux.seccomp: a seccomp filter is not implemented yet", remedy="remove linux.seccomp"
        )


def _launch(store: Store, state: State, spec: Spec, tee: Sequence[int]) -> State:
    """Start monitor and init, go through the handshake, save the state as created."""
    directory = store.directory(state.id)
    fifo = directory / "exec.fifo"
    os.mkfifo(fifo, 0o600)
    (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child_fds = [theirs.fileno(), out_w, err_w]
    monitor: shim.Monitor | None = None
    try:
        try:
            monitor = shim.spawn(
                directory, stdout=out_r, stderr=err_r, tee=tee, child_fds=child_fds,
                child=selfexec.command("runtime.init", str(theirs.fileno())),
            )  # fmt: skip
            Cgroup(state.cgroup_paths).add_monitor(monitor.pid)
        finally:
            theirs.close()
            stdio = ("/dev/null", _link(out_w), _link(err_w))
            for fd in (out_r, out_w, err_r, err_w):
                os.close(fd)
        config: dict[str, Any] = {"bundle": state.bundle, "cgroups": state.cgroup_paths, "fifo": str(fifo)}
        config |= {"stdout": out_w, "stderr": err_w, "state": state.oci()}
        sync.send(ours, {"config": config})
        pid = int(sync.receive(ours, CREATE_TIMEOUT, "the container's init")["pid"])
        started = processes.start_time(pid)
        monitor.watch(pid)
        state = dataclasses.replace(
            state, pid=pid, pid_start_time=started, shim_pid=monitor.pid,
            shim_start_time=processes.start_time(monitor.pid), namespace_paths=namespaces.paths(pid), stdio=stdio,
        )  # fmt: skip
        store.save(state)
        for point in ("prestart", "createRuntime"):
            hooks.run(point, spec.hooks[point], dict(state.oci(), status="creating"))
        sync.send(ours, {})
        sync.receive(ours, CREATE_TIMEOUT, "the container's init")
        return state
    except BaseException:
        if monitor is not None:
            monitor.abandon()
        raise
    finally:
        ours.close()


def _link(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def _write_pid(path: Path, pid: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(str(pid))
        temporary.rename(path)
    except OSError as error:
        raise ContainerError(f"{path}: cannot be written: {error.strerror}") from None


def start(store: Store, container_id: str) -> State:
    """Let the init of a created container run its program."""
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "start", Status.CREATED)
        try:
            fd = os.open(store.directory(container_id) / "exec.fifo", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ContainerError(
                f"container {container_id}: its init does not wait any more: {error.strerror}"
            ) from None
        # Saved before init goes on: a program that ends at once must not be taken for one that was never started.
        state = dataclasses.replace(state, started=True)
        store.save(state)
        with open(fd, "wb") as fifo:
            fifo.write(b"0")
        (store.directory(container_id) / "exec.fifo").unlink(missing_ok=True)
        hooks.run("poststart", _hooks_of(state, "poststart"), state.oci())
        return state


def kill(store: Store, container_id: str, number: signal.Signals, *, everyone: bool = False) -> None:
    """Send a signal to the container's init, or to all its processes."""
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "kill", Status.CREATED, Status.RUNNING, Status.PAUSED)
        if everyone:
            for pid in Cgroup(state.cgroup_paths).pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            return
        pidfd = open_init(state)
        if pidfd is None:
            raise Conflict(f"container not running: {container_id}")
        try:
            signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def open_init(state: State) -> int | None:
    """A pidfd of the container's init; None when it is gone. A reused pid is not taken for it."""
    try:
        pidfd = os.pidfd_open(state.pid)
    except OSError:
        return None
    if state.pid and processes.start_time(state.pid) == state.pid_start_time:
        return pidfd
    os.close(pidfd)
    return None


def delete(store: Store, container_id: str, *, force: bool = False) -> None:
    """Remove a stopped container; with `force` one in any status, and none at all is no error then."""
    if not store.directory(container_id).exists():
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
    pidfd = open_init(state)
    if pidfd is not None:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            Cgroup(state.cgroup_paths).kill()
            if not processes.wait_exit(pidfd, DEATH_TIMEOUT):
                raise DeadlineExceeded(f"container {state.id}: process {state.pid} does not end")
        finally:
            os.close(pidfd)
    cgroup = Cgroup(state.cgroup_paths)
    cgroup.kill()
    wait_monitor(state, MONITOR_TIMEOUT)
    cgroup.remove()
    with contextlib.suppress(ContainerError):
        hooks.run("poststop", _hooks_of(state, "poststop"), dict(state.oci(), status="stopped"))
    store.remove(state.id)


def wait_monitor(state: State, timeout: float) -> None:
    """Wait until the monitor has written all there is to write; end it if it does not by itself."""
    try:
        pidfd = os.pidfd_open(state.shim_pid)
    except OSError:
        return
    try:
        if processes.start_time(state.shim_pid) == state.shim_start_time and not processes.wait_exit(pidfd, timeout):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            processes.wait_exit(pidfd, timeout)
    finally:
        os.close(pidfd)


def _hooks_of(state: State, point: str) -> tuple[Any, ...]:
    """Hooks of the container's bundle; none when the bundle is gone, which must not keep a container from ending."""
    try:
        return load(Path(state.bundle)).hooks[point]
    except ContainerError:
        return ()


def exit_status(store: Store, container_id: str) -> int | None:
    """How the container's init ended: its exit status, 128 + n for signal n, None when that was not recorded."""
    try:
        value = json.loads((store.directory(container_id) / "exit.json").read_bytes())
        return int(value["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_process(
    store: Store,
    container_id: str,
    choose: Callable[[State], Process],
    *,
    detach: bool = False,
    pid_file: Path | None = None,
) -> int:
    """Run another program, which `choose` names, in the container with our own stdio.

    Returns its exit status, or 0 when detached. Signals that we get meanwhile go to it. The lock is held until it runs:
    a container that is being moved must not get a process that would stay behind.
    """
    with store.lock(container_id):
        state = store.load(container_id)
        state.status.require(container_id, "exec", Status.CREATED, Status.RUNNING)
        child, pid = _start_process(state, choose(state), detach=detach, pid_file=pid_file)
    try:
        if detach:
            child.wait(CREATE_TIMEOUT)
            return 0
        with _forwarding(pid):
            return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _start_process(
    state: State, process: Process, *, detach: bool, pid_file: Path | None
) -> "tuple[subprocess.Popen[bytes], int]":
    """Go through the handshake of exec_init.py; the process outside, and the program's pid. Raises StartFailed."""
    import subprocess

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        child = subprocess.Popen(
            selfexec.command("runtime.exec_init", str(theirs.fileno())), pass_fds=[theirs.fileno()], cwd="/"
        )
    try:
        with ours:
            config = {"pid": state.pid, "start_time": state.pid_start_time, "cgroups": state.cgroup_paths}
            config |= {"process": dataclasses.asdict(process), "detach": detach}
            sync.send(ours, {"config": _plain(config)})
            pid = int(sync.receive(ours, CREATE_TIMEOUT, "the exec'ed process")["pid"])
            if pid_file is not None:
                _write_pid(pid_file, pid)
            sync.send(ours, {})
            sync.receive(ours, CREATE_TIMEOUT, "the exec'ed process")
        return child, pid
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _plain(value: Any) -> Any:
    """Sets and tuples as lists, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [_plain(item) for item in value]
    return value


@contextlib.contextmanager
def _forwarding(pid: int) -> Any:
    """Signals meant to end us go to `pid` instead, and we end when it does."""

    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(store: Store, container_id: str, bundle: Path, *, pid_file: Path | None = None) -> int:
    """Create and start a container, copy its output to ours, wait for its end, delete it; returns its exit status."""
    state = create(store, container_id, bundle, pid_file=pid_file, tee=(1, 2))
    try:
        pidfd = os.pidfd_open(state.shim_pid)
        try:
            with _forwarding(state.pid):
                start(store, container_id)
                while not processes.wait_exit(pidfd, 3600.0):
                    pass
        finally:
            os.close(pidfd)
        status = exit_status(store, container_id)
        return 1 if status is None else status
    finally:
        delete(store, container_id, force=True)
