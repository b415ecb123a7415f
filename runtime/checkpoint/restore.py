"""Bringing a container back from CRIU's images, held until it may run."""

from __future__ import annotations

import fcntl
import os
import socket
import time

from criu_rpc.client import Criu
from criu_rpc.options import RestoreOptions
from criu_rpc.swrk import Swrk
from runtime.cgroups import monitor as monitor_cgroup
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.hierarchies import UNIFIED
from runtime.cgroups.leeway import Leeway
from runtime.checkpoint import options as criu_options
from runtime.checkpoint import supplement
from runtime.errors import ContainerError, DeadlineExceeded, NotFound
from runtime.init import container as container_init
from runtime.init import hooks, idmaps
from runtime.init import program as container_program
from runtime.lifecycle import delete, provision
from runtime.light.records import Record
from runtime.linux import namespaces, processes, selfexec, syscalls
from runtime.linux.mount_flags import ATTR_IDMAP
from runtime.monitor import spawn
from runtime.spec.fields import Fields
from runtime.spec.mounts import IdMapping
from runtime.spec.resources import parse_resources
from runtime.state.kept_config import keep
from runtime.state.record import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, Self

    from criu_rpc.client import RestoreSession
    from runtime.network.announce import Announcer
    from runtime.spec.config import Spec
    from runtime.state.store import Store


MONITOR_TIMEOUT = 5.0
RESUME_TIMEOUT = 30.0  # for CRIU, once it may let the tree run
ABORT_TIMEOUT = 5.0  # seconds in which CRIU undoes what it did


class RestorePlan(Record):
    """What a restore needs to know beside the spec.

    `stdio` are the init's standard streams as they were named at the dump ("pipe:[123]"); `rootfs` overrides the
    bundle's; `carried` is what goes along of the old state beside annotations: created, bundle_hints, resources; `move`
    the migration this belongs to, `source` the host that it comes from; `options` are further RestoreOptions. An
    `adoptable` container is its caller's where that is ready to be (spawn.py); a `foreground` one is a child of ours,
    with our own standard streams. `mounted` are mounts that are bound in as they are here: mount point in the container
    -> path here.
    """

    id: str
    bundle: str
    images: str
    work: str
    stdio: tuple[str, ...]
    carried: dict[str, Any] = {}
    rootfs: str | None = None
    move: str | None = None
    source: str | None = None
    options: dict[str, Any] = {}
    adoptable: bool = False
    foreground: bool = False
    systemd: bool = False
    mounted: dict[str, str] = {}


class Restoring:
    """A container on its way into existence: `prepare`, `restore` (held), then `resume` or `abort`."""

    def __init__(self, store: Store, state: State, plan: RestorePlan, spec: Spec) -> None:
        self._store, self._state, self._plan, self._spec = store, state, plan, spec
        self._cgroup = Cgroup({})
        self._leeway = Leeway()
        self._monitor: spawn.Monitor | None = None
        self._connection: Swrk | None = None
        self._session: RestoreSession | None = None
        self._options: Callable[[int, int], RestoreOptions] | None = None
        self._released = False
        self._announcer: Announcer | None = None
        self._hooked = False

    @property
    def history_path(self) -> str:
        """Where the log of the container's earlier places goes."""
        return self._state.log_path + ".1"

    @property
    def memory_cgroup(self) -> str:
        """The directory of the cgroup that counts the container's memory, "" if there is none."""
        return self._cgroup.paths.get("memory") or self._cgroup.paths.get(UNIFIED, "")

    @classmethod
    def prepare(cls, store: Store, spec: Spec, plan: RestorePlan, criu: Criu) -> Self:
        """Make everything but the tree: directory, cgroup, network, monitor, and a CRIU that waits.

        The network is connected by `resume`: until then the container may be in it elsewhere. Must be called by a
        process without threads. Raises Conflict when the id is in use; a failure leaves nothing.
        """
        if spec.network is not None:
            from runtime.spec import config as spec_config

            spec = spec_config.with_mac(spec)
        carried = plan.carried
        updated: dict[str, Any] = dict(carried.get("resources", {}))
        limits = parse_resources(Fields(updated, "update"))
        directory = store.create(plan.id)
        rootfs = os.path.realpath(plan.rootfs or spec.root)
        state = State(
            id=plan.id,
            bundle=plan.bundle,
            rootfs=rootfs,
            created=str(carried.get("created") or provision.now()),
            log_path=directory + "/log",
            annotations=spec.annotations,
            hooks=provision.later_hooks(spec),
            bundle_hints=tuple(str(hint) for hint in list(carried.get("bundle_hints", []))[-8:]),
            move=plan.move,
            moved_from=plan.source,
            # Until there is a monitor it is for us to say whether the container is still on its way.
            monitor_pid=os.getpid() if plan.move else 0,
            monitor_start_time=processes.start_time(os.getpid()) if plan.move else None,
            resources=updated,
        )
        if spec.network is not None:
            provision.claim_network(store, state, spec.network)
        restoring = cls(store, state, plan, spec)
        try:
            keep(spec, directory)
            restoring._state, restoring._cgroup = provision.make_cgroup(
                store, state, spec, systemd=plan.systemd or ":" in (spec.cgroups_path or "")
            )
            restoring._cgroup.apply(limits)
            restoring._leeway.lift(restoring._cgroup.paths)
            restoring._launch(spec, criu, directory, rootfs)
        except BaseException:
            restoring.abort()
            raise
        return restoring

    def _launch(self, spec: Spec, criu: Criu, directory: str, rootfs: str) -> None:
        """Start a CRIU as the monitor's (or our, or our caller's) child, both ends of all pipes in the right hands."""
        opened: list[int] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            namespaces_inherited = self._open_namespaces(spec, opened)
            streams = [_duplicate(fd) for fd in (0, 1, 2)]
            opened += [fd for fd in streams if fd >= 0]
            (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe()
            opened += [out_r, out_w, err_r, err_w]
            wrapper = [
                rootfs,
                "cgroupns" if "cgroup" in spec.namespaces else "",
                f"_ses.{self._plan.id}",
                *self._cgroup.directories(),
            ]
            argv = selfexec.command(
                "runtime.checkpoint.criu_launcher", *wrapper, "--", criu.path, "swrk", str(theirs.fileno())
            )
            inherited = [theirs.fileno(), *streams, out_w, err_w, *(fd for _, fd in namespaces_inherited)]

            def child(_own: bool) -> NoReturn:
                container_program.reset_signals()
                null = os.open("/dev/null", os.O_RDWR)
                for number in (0, 1, 2):
                    os.dup2(null, number)
                container_init.close_all_but(set(inherited), 0)
                for fd in inherited:
                    if fd >= 0:
                        os.set_inheritable(fd, True)
                selfexec.execute(argv)

            if self._plan.foreground:
                syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
                own = True
                if processes.fork() == 0:
                    child(True)
            else:
                self._monitor = spawn.spawn(
                    directory, child, cgroup=self._cgroup, stdout=out_r, stderr=err_r,
                    adoptable=self._plan.adoptable, fresh=True,
                )  # fmt: skip
                own = not self._monitor.pid
            ends = tuple(streams) if own else (-1, out_w, err_w)
            self._state = self._state.replace(stdio=self._names(spec, ends))
            if self._monitor is not None and self._monitor.pid:
                if self._cgroup.unit is not None:
                    monitor_cgroup.add(self._cgroup, self._monitor.pid)
                start = processes.start_time(self._monitor.pid)
                self._state = self._state.replace(monitor_pid=self._monitor.pid, monitor_start_time=start)
            self._store.save(self._state)
            inherit = [*namespaces_inherited, *self._streams(ends)]
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in opened:
                os.close(fd)
        self._connection = Swrk.adopt(ours)
        outside = criu_options.external_mounts(spec, self._state.cgroup_paths) | self._plan.mounted
        external = tuple(f"mnt[{destination}]:{source}" for destination, source in outside.items())
        options = criu_options.common_options(spec)
        self._options = lambda images, work: RestoreOptions(
            images_dir_fd=images, work_dir_fd=work, root=rootfs, external=external, inherit_fd=tuple(inherit),
            orphan_pts_master=spec.process.terminal, **options | self._plan.options,
        )  # fmt: skip

    def _open_namespaces(self, spec: Spec, opened: list[int]) -> list[tuple[str, int]]:
        """The namespaces that CRIU does not make: key in the images -> descriptor, which is noted in `opened`."""
        found: list[tuple[str, int]] = []
        if criu_options.is_own_network(spec):
            opened.append(namespaces.new_netns())
            self._build_network(opened[-1])
            found.append((criu_options.external_key("network"), opened[-1]))
        for kind, path in criu_options.joined(spec).items():
            opened.append(namespaces.open_path(kind, path))
            found.append((criu_options.external_key(kind), opened[-1]))
        return found

    def _build_network(self, netns: int) -> None:
        """All of a network on a bridge but its connection to it, in a namespace that holds only `lo`."""
        if self._spec.network is not None:
            from runtime.network import announce, veth

            veth.build(self._state, self._spec.network, netns)
            self._announcer = announce.Announcer(self._spec.network, netns)

    def _fill_network(self, pid: int) -> None:
        """The network in the namespace that CRIU has made for its restored init `pid`."""
        netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespaces.inside_netns(netns, lambda: namespaces.bring_up("lo"))
            self._build_network(netns)
        finally:
            os.close(netns)

    def _streams(self, ends: tuple[int, ...]) -> list[tuple[str, int]]:
        """What takes the place of the pipes that were the container's standard streams."""
        found: dict[str, int] = {}
        for name, fd in zip(self._plan.stdio, ends, strict=False):
            if name.startswith("pipe:") and fd >= 0:
                found.setdefault(name, fd)
        return list(found.items())

    def _names(self, spec: Spec, ends: tuple[int, ...]) -> tuple[str, str, str]:
        names = [os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else "/dev/null" for fd in ends]
        if spec.process.terminal:
            names = [*self._plan.stdio, "", "", ""]
        return names[0], names[1], names[2]

    def restore(self, timeout: float, take_terminal: Callable[[int], None] | None = None) -> int:
        """Restore up to `post-restore`, within `timeout` seconds: the tree exists and is held. Returns its init's pid.

        Raises CriuError, DeadlineExceeded, StartFailed (no monitor). How long it is held then is up to the caller.

        `take_terminal` gets the master of the container's terminal, if it has one; without it, a monitor of ours does.
        """
        assert self._connection is not None
        assert self._options is not None
        images = self._open_images()
        work = os.open(self._plan.work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            connection, self._connection = self._connection, None
            options = self._options(images, work)
            extra = supplement.load(images)
            supplement.prepare(extra, self._cgroup)
            deadline = time.monotonic() + timeout
            self._session = Criu().restore(options, timeout=timeout, connection=connection)
            self._set_up_namespaces(deadline)
            masters: list[int] = []
            pid = self._session.run_until("post-restore", take=masters.append).pid
            for master in masters:
                self._hand_on(master, take_terminal)
            supplement.apply(extra, pid, self._cgroup)
            self._leeway.end()
            if self._monitor is not None:
                self._monitor.ping(max(0.1, min(MONITOR_TIMEOUT, deadline - time.monotonic())))
        finally:
            os.close(images)
            os.close(work)
        self._cgroup.release_claim()
        self._state = self._state.replace(
            pid=pid, pid_start_time=processes.start_time(pid), namespace_paths=namespaces.paths(pid)
        )
        self._store.save(self._state)
        return pid

    def _set_up_namespaces(self, deadline: float) -> None:
        """What is done at a `create` in new namespaces from outside: they are there, and nothing else is yet.

        The container may be frozen elsewhere meanwhile: a hook without a timeout has to end by the `deadline`, too.
        """
        assert self._session is not None
        points = [point for point in ("prestart", "createRuntime") if self._spec.hooks[point]]
        users_network = criu_options.is_users_network(self._spec)
        if not (points or users_network):
            return
        pid = self._session.run_until("setup-namespaces").pid
        if users_network:
            self._fill_network(pid)
        for point in points:
            self._hooked = True
            state = self._state.replace(pid=pid).oci("creating")
            hooks.run(point, self._spec.hooks[point], state, deadline=deadline)

    def _hand_on(self, master: int, take_terminal: Callable[[int], None] | None) -> None:
        from runtime.freeze import monitor_hold

        recent = monitor_hold.refill(self._plan.images, master)
        if take_terminal is not None:
            take_terminal(master)
            return
        if self._monitor is not None and self._monitor.pid:
            self._monitor.give_terminal(master, recent)
        os.close(master)

    def _open_images(self) -> int:
        """The directory of the images, readable for the root of a user namespace as well.

        Half of CRIU runs inside it, and what root has written is not for others: a mount that shows the files as its
        own is handed to CRIU then. Before the ids are mapped CRIU comes as nobody but a member of root's group.
        """
        spec = self._spec
        if not spec.uid_mappings:
            return os.open(self._plan.images, os.O_RDONLY | os.O_DIRECTORY)
        tree = syscalls.open_tree(self._plan.images, recursive=False)
        os.chmod(self._plan.images, 0o750)
        for entry in os.scandir(self._plan.images):
            if entry.name.endswith(".img") and entry.is_file(follow_symlinks=False):
                os.chmod(entry.path, 0o640)
        userns = idmaps.namespace(spec.uid_mappings, (IdMapping(0, 0, 2**32 - 1),))
        try:
            syscalls.mount_setattr(tree, set=ATTR_IDMAP, clear=0, recursive=False, userns_fd=userns)
        except OSError as error:
            os.close(tree)
            root = next((mapping.host for mapping in spec.uid_mappings if mapping.container == 0), None)
            if self._plan.move is None or root is None:
                raise ContainerError(
                    f"{self._plan.images}: the file system cannot map ids, which a user namespace needs: "
                    f"{error.strerror}"
                ) from None
            return self._give_images(root)
        finally:
            os.close(userns)
        return tree

    def _give_images(self, uid: int) -> int:
        """The same with the files themselves given to that root: tmpfs maps no ids before Linux 6.3.

        Only for images that were made for this restore. The directory above keeps everybody but root out.
        """
        for entry in os.scandir(self._plan.images):
            if entry.name.endswith(".img") and entry.is_file(follow_symlinks=False):
                os.chown(entry.path, uid, 0, follow_symlinks=False)
        os.chown(self._plan.images, uid, 0)
        return os.open(self._plan.images, os.O_RDONLY | os.O_DIRECTORY)

    def require_held(self) -> None:
        """Check that the restored tree is there and that CRIU holds it. Raises CriuError, ContainerError."""
        assert self._session is not None
        self._session.require_alive()
        if not processes.runs(self._state.pid, self._state.pid_start_time):
            raise ContainerError(f"container {self._state.id}: the restored tree has ended while it was held")

    def resume(self) -> State:
        """Let the tree run. The monitor keeps it from here on.

        CRIU kills the tree when it loses us at `post-restore`, and lets it run when it loses us at `network-unlock`,
        the next notification: so that is where the state says that the container has been started. Its network is
        connected before: where sockets leave repair mode the kernel asks their peers to go on.
        """
        assert self._session is not None
        self._session.prolong(RESUME_TIMEOUT)
        if self._monitor is not None:
            self._monitor.watch(self._state.pid)
        if self._announcer is not None and self._spec.network is not None:
            from runtime.network import veth

            veth.attach(self._state, self._spec.network)
            self._announcer.send()
            self._announcer.ask()
        self._state = self._state.replace(releasing=True)
        self._store.save(self._state)
        # CRIU unlocks, and says so, only a network that is not the host's.
        self._session.run_until("network-unlock" if "network" in self._spec.namespaces else "pre-resume")
        if "network" in criu_options.joined(self._spec):
            from runtime.freeze import network_lock

            network_lock.back(self._spec, self._state.id)
        self._released = True
        self._state = self._state.replace(started=True, releasing=False)
        self._store.save(self._state)
        self._session.finish()
        self._session = None
        self._leeway.settle()
        if self._announcer is not None:
            if not self._plan.foreground:  # we stay then, and wait for no child but the container
                self._announcer.repeat()
            self._announcer.close()
        return self._state

    def abort(self) -> None:
        """Kill what was restored and remove everything that `prepare` made; not once the tree was let run."""
        if self._released:
            return
        provision.remove_network(self._state)  # first: nothing of what ends now leaves the host
        if self._announcer is not None:
            self._announcer.close()
        if self._session is not None:
            self._session.abort()
            self._session = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._monitor is not None:
            self._await_criu()
        provision.kill_cgroup(self._cgroup)  # a CRIU that was killed has not killed what it had restored
        if self._monitor is not None:
            self._monitor.abandon()
        provision.remove_cgroup(self._cgroup)
        if self._hooked:
            hooks.run_all("poststop", self._spec.hooks["poststop"], self._state.oci("stopped"))
        self._store.remove(self._state.id)

    def _await_criu(self) -> None:
        """Let CRIU remove the names that it has made among the container's files: the next restore trips over them.

        A monitor that is stopped does not reap it.
        """
        deadline = time.monotonic() + ABORT_TIMEOUT
        keeper, own = (self._state.monitor_pid, self._state.monitor_start_time), {self._state.pid}
        while time.monotonic() < deadline:
            if all(map(processes.is_dying, processes.children(*keeper) - own)):
                return
            time.sleep(0.005)

    @staticmethod
    def left_behind(store: Store, container_id: str, move: str, timeout: float) -> State | None:
        """What has become of a restore for the migration `move` whose process died.

        The state of the container if it was let run (it may have ended since); None if it was not: what is left of it
        has been removed then. Raises DeadlineExceeded when CRIU or the monitor does not come to an end.
        """
        try:
            state = store.look(container_id)
        except NotFound:
            return None
        if state.move != move:
            return None
        deadline = time.monotonic() + timeout
        while processes.children(state.monitor_pid, state.monitor_start_time) - {state.pid}:  # CRIU is still at it
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the restore of {container_id} for migration {move} does not end")
            time.sleep(0.02)
        # One that lives without CRIU was not let run for that: its monitor may be about to kill it.
        if state.releasing and processes.runs(state.pid, state.pid_start_time):
            state = state.replace(started=True, releasing=False)
            store.save(state)
        if state.started:
            return state
        delete.remove(store, state)
        return None


def _duplicate(fd: int) -> int:
    """A copy of a descriptor above the standard ones, -1 when it is closed."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:
        return -1
