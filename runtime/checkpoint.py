"""What of a container CRIU must be told, at dump and at restore, and what is made around a restored tree.

Kept out of CRIU's hands, because it is cheaper or sounder so:
- the network namespace is external: it is made anew with `lo` up before the source is frozen;
- cgroups are ignored: the restored tree is born in the container's new cgroup (criu_exec.py);
- stdout and stderr are pipes of the monitor: at restore the new monitor's pipes are inherited in their place.
"""

import contextlib
import dataclasses
import fcntl
import os
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from criu_rpc.client import Criu, RestoreSession
from criu_rpc.options import DumpOptions, RestoreOptions
from criu_rpc.swrk import Swrk
from runtime import container, namespaces, processes, selfexec, shim
from runtime.cgroups import Cgroup
from runtime.errors import ContainerError, DeadlineExceeded, NotFound, StartFailed
from runtime.spec import Spec
from runtime.state import State, Status, Store

_NETNS_KEY = "pymigrate-net"
DEATH_TIMEOUT = 30.0


def _own_network(spec: Spec) -> bool:
    """Whether the container has a network namespace of its own, which we make anew at restore."""
    return "network" in spec.namespaces and spec.namespaces["network"] is None


def _joined(spec: Spec) -> dict[str, str]:
    """Namespaces that the container joined by a path: type -> path."""
    return {kind: path for kind, path in spec.namespaces.items() if path is not None}


def bind_mounts(spec: Spec) -> dict[str, str]:
    """Mount point -> source on the host, of the bind mounts whose source lies outside the container."""
    return {mount.destination.rstrip("/"): os.path.realpath(mount.source) for mount in spec.mounts if mount.is_bind}


def dump_options(
    state: State,
    spec: Spec,
    *,
    images_dir_fd: int,
    work_dir_fd: int,
    page_server_fd: int | None = None,
    leave_running: bool = False,
) -> DumpOptions:
    """What CRIU must know to dump this container. The descriptors are the caller's."""
    external = [f"mnt[{destination}]:{destination}" for destination in bind_mounts(spec)]
    if "network" in spec.namespaces:
        inode = os.stat(f"/proc/{state.pid}/ns/net").st_ino
        external.append(f"net[{inode}]:{_NETNS_KEY}")
    for kind in set(_joined(spec)) - {"network"}:
        inode = os.stat(f"/proc/{state.pid}/ns/{namespaces.FILES[kind]}").st_ino
        external.append(f"{namespaces.FILES[kind]}[{inode}]:pymigrate-{kind}")
    return DumpOptions(
        pid=state.pid,
        images_dir_fd=images_dir_fd,
        work_dir_fd=work_dir_fd,
        root=state.rootfs,
        external=tuple(external),
        tcp_established=True,
        file_locks=True,
        link_remap=True,
        leave_running=leave_running,
        page_server_fd=page_server_fd,
    )


def wait_output_logged(state: State, timeout: float) -> None:
    """Wait until the monitor has taken all that a frozen container has written, `timeout` seconds at most."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        waiting = sum(_unread(state.pid, number) for number in (1, 2))
        # With the pipes empty, a monitor that sleeps has written what it has read.
        stat = Path(f"/proc/{state.shim_pid}/stat").read_bytes().rpartition(b")")[2].split()
        if waiting == 0 and stat[0] == b"S":
            return
        time.sleep(0.001)


def _unread(pid: int, number: int) -> int:
    """Bytes in the pipe behind a descriptor of a process; 0 when it is no pipe any more."""
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("pipe:"):
            return 0
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(fd)


def is_running(state: State) -> bool:
    """Whether the container's init lives and is not stopped."""
    return state.status in (Status.RUNNING, Status.CREATED, Status.PAUSED)


def end(state: State) -> None:
    """Kill a container's processes and wait until the last one is gone. Harmless when it is dead."""
    pidfd = container.open_init(state)
    if pidfd is None:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not processes.wait_exit(pidfd, DEATH_TIMEOUT):
            raise DeadlineExceeded(f"container {state.id}: process {state.pid} does not end")
    finally:
        os.close(pidfd)


@dataclass(frozen=True)
class RestorePlan:
    """What a restore needs to know beside the spec.

    `stdio` are the init's standard streams as they were named at the dump ("pipe:[123]"); `rootfs` overrides the
    bundle's; `carried` is what goes along of the old state: annotations, created, bundle_hints; `move` the migration
    this belongs to.
    """

    id: str
    bundle: Path
    images: Path
    work: Path
    stdio: tuple[str, ...]
    carried: dict[str, Any] = field(default_factory=dict)
    rootfs: Path | None = None
    move: str | None = None


class Restoring:
    """A container on its way into existence: `prepare`, `restore` (held), then `resume` or `abort`."""

    def __init__(self, store: Store, state: State, plan: RestorePlan) -> None:
        self._store, self._state, self._plan = store, state, plan
        self._cgroup: Cgroup | None = None
        self._monitor: shim.Monitor | None = None
        self._connection: Swrk | None = None
        self._session: RestoreSession | None = None
        self._options: Callable[[int, int], RestoreOptions] | None = None
        self._released = False

    @property
    def history_path(self) -> Path:
        """Where the log of the container's earlier places goes."""
        return Path(self._state.log_path + ".1")

    @classmethod
    def prepare(cls, store: Store, spec: Spec, plan: RestorePlan, criu: Criu) -> Self:
        """Make everything but the tree: directory, cgroup, network namespace, monitor, and a CRIU that waits.

        Must be called by a process without threads. Raises Conflict when the id is in use; a failure leaves nothing.
        """
        directory = store.create(plan.id)
        rootfs = (plan.rootfs or spec.root).resolve()
        carried = plan.carried
        state = State(
            id=plan.id,
            bundle=str(plan.bundle),
            rootfs=str(rootfs),
            created=str(carried.get("created") or datetime.now(UTC).isoformat()),
            log_path=str(directory / "log"),
            annotations={str(key): str(value) for key, value in dict(carried.get("annotations", {})).items()},
            bundle_hints=tuple(str(hint) for hint in list(carried.get("bundle_hints", []))[-8:]),
            move=plan.move,
        )
        restoring = cls(store, state, plan)
        try:
            store.save(state)
            restoring._cgroup = Cgroup.create(plan.id, spec.cgroups_path)
            restoring._state = dataclasses.replace(state, cgroup_paths=restoring._cgroup.paths)
            store.save(restoring._state)
            restoring._cgroup.apply(spec.resources)
            restoring._launch(spec, criu, directory, rootfs)
        except BaseException:
            restoring.abort()
            raise
        return restoring

    def _launch(self, spec: Spec, criu: Criu, directory: Path, rootfs: Path) -> None:
        """Start the monitor with a CRIU as its child, both ends of all pipes in the right hands."""
        (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
        inherited: list[tuple[str, int]] = []
        opened = [out_r, out_w, err_r, err_w]
        names = (*self._plan.stdio, "", "", "")[:3]
        if names[1]:
            inherited.append((names[1], out_w))
        if names[2] and names[2] != names[1]:
            inherited.append((names[2], err_w))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if _own_network(spec):
                opened.append(namespaces.new_netns())
                inherited.append((_NETNS_KEY, opened[-1]))
            for kind, path in _joined(spec).items():
                opened.append(_open_namespace(kind, path))
                key = _NETNS_KEY if kind == "network" else f"pymigrate-{kind}"
                inherited.append((key, opened[-1]))
            wrapper = [
                str(rootfs),
                "cgroupns" if "cgroup" in spec.namespaces else "",
                *Cgroup(self._state.cgroup_paths).directories(),
            ]
            self._monitor = shim.spawn(
                directory, stdout=out_r, stderr=err_r, child_fds=[theirs.fileno(), *(fd for _, fd in inherited)],
                child=selfexec.command("runtime.criu_exec", *wrapper, "--", criu.path, "swrk", str(theirs.fileno())),
            )  # fmt: skip
            Cgroup(self._state.cgroup_paths).add_monitor(self._monitor.pid)
            self._state = dataclasses.replace(
                self._state, shim_pid=self._monitor.pid, shim_start_time=processes.start_time(self._monitor.pid),
                stdio=("/dev/null", os.readlink(f"/proc/self/fd/{out_w}"), os.readlink(f"/proc/self/fd/{err_w}")),
            )  # fmt: skip
            self._store.save(self._state)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in opened:
                os.close(fd)
        self._connection = Swrk.adopt(ours)
        external = tuple(f"mnt[{destination}]:{source}" for destination, source in bind_mounts(spec).items())
        self._options = lambda images, work: RestoreOptions(
            images_dir_fd=images,
            work_dir_fd=work,
            root=str(rootfs),
            external=external,
            tcp_established=True,
            file_locks=True,
            link_remap=True,
            inherit_fd=tuple(inherited),
        )

    def restore(self, timeout: float) -> int:
        """Restore up to `post-restore`: the tree exists and is held. Returns its init's pid. Raises CriuError."""
        assert self._connection is not None
        assert self._options is not None
        images = os.open(self._plan.images, os.O_RDONLY | os.O_DIRECTORY)
        work = os.open(self._plan.work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            connection, self._connection = self._connection, None
            options = self._options(images, work)
            self._session = Criu().restore(options, timeout=timeout, connection=connection)
            pid = self._session.run_until("post-restore").pid
        finally:
            os.close(images)
            os.close(work)
        self._state = dataclasses.replace(
            self._state, pid=pid, pid_start_time=processes.start_time(pid), namespace_paths=namespaces.paths(pid)
        )
        self._store.save(self._state)
        return pid

    def resume(self) -> State:
        """Let the tree run. The monitor keeps it from here on.

        CRIU kills the tree when it loses us at `post-restore`, and lets it run when it loses us at `network-unlock`,
        the next notification: so that is where the state says that the container has been started.
        """
        assert self._session is not None
        assert self._monitor is not None
        self._monitor.watch(self._state.pid)
        self._session.run_until("network-unlock")
        self._released = True
        self._state = dataclasses.replace(self._state, started=True)
        self._store.save(self._state)
        self._session.finish()
        self._session = None
        return self._state

    def abort(self) -> None:
        """Kill what was restored and remove everything that `prepare` made; not once the tree was let run."""
        if self._released:
            return
        if self._session is not None:
            self._session.abort()
            self._session = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._monitor is not None:
            self._monitor.abandon()
        if self._cgroup is not None:
            self._cgroup.kill()
            with contextlib.suppress(ContainerError):
                self._cgroup.remove()
        self._store.remove(self._state.id)

    @staticmethod
    def left_behind(store: Store, container_id: str, move: str, timeout: float) -> State | None:
        """What has become of a restore for the migration `move` whose process died.

        The state of the container if it was let run (it may have ended since); None if it was not: what is left of it
        has been removed then. Raises DeadlineExceeded when CRIU or the monitor does not come to an end.
        """
        try:
            state = store.load(container_id)
        except NotFound:
            return None
        if state.move != move:
            return None
        deadline = time.monotonic() + timeout
        while processes.children(state.shim_pid, state.shim_start_time) - {state.pid}:  # CRIU is still at it
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the restore of {container_id} for migration {move} does not end")
            time.sleep(0.02)
        if not state.started and state.pid and processes.is_alive(state.pid, state.pid_start_time):
            state = dataclasses.replace(state, started=True)
            store.save(state)
        if state.started:
            return state
        container.remove(store, state)
        return None


def _open_namespace(kind: str, path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartFailed(f"linux.namespaces ({kind}): {path}: {error.strerror}") from None
