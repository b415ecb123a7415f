"""Restore a container from CRIU's images, and hold it until it may run.

What a restore shares with `create` is in lifecycle/provision.py; restore_criu.py starts CRIU.
"""

from __future__ import annotations

import os
import time

from criu_rpc.client import Criu
from criu_rpc.options import RestoreOptions
from runtime.cgroups.hierarchies import UNIFIED
from runtime.cgroups.leeway import Leeway
from runtime.checkpoint import options as criu_options
from runtime.checkpoint import restore_images, supplement
from runtime.checkpoint.restore_criu import RestorePlan, RestoringCriu
from runtime.checkpoint.restore_network import RestoredNetwork
from runtime.errors import ContainerError, DeadlineExceeded, NotFound
from runtime.init import hooks
from runtime.lifecycle import delete
from runtime.lifecycle.provision import Provision
from runtime.limits import CRIU_UNDO_TIMEOUT, MONITOR_PING_TIMEOUT, RESUME_TIMEOUT
from runtime.linux import processes
from runtime.linux.descriptors import Owned
from runtime.spec.fields import Fields
from runtime.spec.resources import parse_resources
from runtime.state import lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

    from criu_rpc.client import RestoreSession
    from runtime.cgroups.cgroup import Cgroup
    from runtime.spec.config import Spec
    from runtime.state.record import State
    from runtime.state.store import Store


class Restoring:
    """A container that is being restored: `prepare`, `restore` (held), then `resume` or `abort`."""

    def __init__(self, made: Provision, plan: RestorePlan) -> None:
        self._made, self._plan, self._spec = made, plan, made.spec
        self._leeway = Leeway()
        self._network = RestoredNetwork(made)
        self._criu = RestoringCriu(made, plan)
        self._session: RestoreSession | None = None
        self._released = False
        self._hooked = False

    @property
    def history_path(self) -> str:
        """The file for the log of the container's earlier places."""
        return self._made.state.log_path + ".1"

    @property
    def memory_cgroup(self) -> str:
        """The directory of the cgroup that counts the container's memory, "" if there is none."""
        paths = self._made.cgroup.paths
        return paths.get("memory") or paths.get(UNIFIED, "")

    @property
    def memory_note(self) -> str:
        """The file that says how much of the container's memory is not in place (state/lazy.py)."""
        return lazy.note(self._made.state)

    @property
    def cgroup(self) -> Cgroup:
        """The container's cgroup."""
        return self._made.cgroup

    @classmethod
    def prepare(cls, store: Store, spec: Spec, plan: RestorePlan, criu: Criu) -> Self:
        """Make everything but the tree: directory, cgroup, network, monitor, and a CRIU that waits.

        `resume` connects the network: until then the container may be in it elsewhere. Must be called by a process
        without threads. Raises Conflict when the id is in use; a failure leaves nothing.
        """
        carried = plan.carried
        updated: dict[str, Any] = dict(carried.get("resources", {}))
        limits = parse_resources(Fields(updated, "update"))
        fields: dict[str, Any] = {"created": str(carried["created"])} if carried.get("created") else {}
        if plan.move:  # until there is a monitor, this process shows whether the container is still on its way
            own = os.getpid()
            fields |= {"monitor_pid": own, "monitor_start_time": processes.start_time(own)}
        made = Provision(
            store, spec, plan.id, plan.bundle,
            rootfs=os.path.realpath(plan.rootfs or spec.root),
            bundle_hints=tuple(str(hint) for hint in list(carried.get("bundle_hints", []))[-8:]),
            move=plan.move, moved_from=plan.source, resources=updated, **fields,
        )  # fmt: skip
        restoring = cls(made, plan)
        try:
            made.set_up(systemd=plan.systemd or ":" in (spec.cgroups_path or ""))
            made.cgroup.apply(limits)
            restoring._leeway.lift(made.cgroup.paths)
            restoring._criu.start(criu.path, restoring._network)
        except BaseException:
            restoring.abort()
            raise
        return restoring

    def restore(
        self, timeout: float, take_terminal: Callable[[int], None] | None = None, *, lazy_pages: bool = False
    ) -> int:
        """Restore up to `post-restore`, within `timeout` seconds: the tree exists and is held. Returns its init's pid.

        With `lazy_pages` a page handler listens beside the images, for memory that they lack.
        The caller decides how long to hold it. `take_terminal` gets the master of the container's terminal, if it has
        one; without `take_terminal` the monitor gets it. Raises CriuError, DeadlineExceeded, StartFailed (no monitor).
        """
        plan, made, monitor = self._plan, self._made, self._criu.monitor
        with Owned() as directories:
            images = directories.fd(
                restore_images.open_directory(plan.images, self._spec, may_give=plan.move is not None)
            )
            work = directories.fd(os.open(plan.work, os.O_RDONLY | os.O_DIRECTORY))
            extra = supplement.load(images)
            supplement.prepare(extra, made.cgroup)
            deadline = time.monotonic() + timeout
            options = self._options(images, work, lazy_pages=lazy_pages)
            self._session = Criu().restore(options, timeout=timeout, connection=self._criu.take_connection())
            self._set_up_namespaces(deadline)
            masters: list[int] = []
            pid = self._session.run_until("post-restore", take=masters.append).pid
            for master in masters:
                self._hand_on(master, take_terminal)
            supplement.apply(extra, pid, made.cgroup)
            self._leeway.end()
            if monitor is not None:
                monitor.ping(max(0.1, min(MONITOR_PING_TIMEOUT, deadline - time.monotonic())))
        made.add_init(pid)
        return pid

    def _options(self, images: int, work: int, *, lazy_pages: bool) -> RestoreOptions:
        state, spec = self._made.state, self._spec
        outside = criu_options.external_mounts(spec, state.cgroup_paths) | self._plan.mounted
        options = criu_options.common_options(spec) | {"lazy_pages": lazy_pages} | self._plan.options
        return RestoreOptions(
            images_dir_fd=images, work_dir_fd=work, root=state.rootfs, inherit_fd=self._criu.inherit,
            external=tuple(f"mnt[{destination}]:{source}" for destination, source in outside.items()),
            orphan_pts_master=spec.process.terminal, **options,
        )  # fmt: skip

    def _set_up_namespaces(self, deadline: float) -> None:
        """Do what `create` does from outside in new namespaces: they exist by now, and nothing else does.

        The container may be frozen elsewhere meanwhile, so a hook without a timeout also has to exit by the `deadline`.
        """
        assert self._session is not None
        points = [point for point in ("prestart", "createRuntime") if self._spec.hooks[point]]
        users_network = criu_options.is_users_network(self._spec)
        if not (points or users_network):
            return
        pid = self._session.run_until("setup-namespaces").pid
        if users_network:
            self._network.fill(pid)
        for point in points:
            self._hooked = True
            state = self._made.state.replace(pid=pid).oci("creating")
            hooks.run(point, self._spec.hooks[point], state, deadline=deadline)

    def _hand_on(self, master: int, take_terminal: Callable[[int], None] | None) -> None:
        from runtime.freeze import monitor_hold

        recent = monitor_hold.refill(self._plan.images, master)
        if take_terminal is not None:
            take_terminal(master)
            return
        monitor = self._criu.monitor
        if monitor is not None and monitor.pid:
            monitor.give_terminal(master, recent)
        os.close(master)

    def require_held(self) -> None:
        """Check that the restored tree exists and that CRIU holds it. Raises CriuError, ContainerError."""
        assert self._session is not None
        self._session.require_alive()
        state = self._made.state
        if not processes.runs(state.pid, state.pid_start_time):
            raise ContainerError(f"container {state.id}: the restored tree exited while it was held")

    def resume(self) -> State:
        """Resume the tree. The monitor keeps it from here on.

        CRIU kills the tree when it loses this process at `post-restore`, and resumes it when it loses this process at
        `network-unlock`, the next notification: so the state says there that the container has been started. Its
        network is connected before, because the kernel asks the peers of a socket to continue when the socket leaves
        repair mode.
        """
        assert self._session is not None
        made = self._made
        self._session.prolong(RESUME_TIMEOUT)
        if self._criu.monitor is not None:
            self._criu.monitor.watch(made.state.pid)
        self._network.connect()
        made.update(releasing=True)
        # CRIU unlocks, and reports, only a network that is not the host's.
        self._session.run_until("network-unlock" if "network" in self._spec.namespaces else "pre-resume")
        if "network" in criu_options.joined(self._spec):
            from runtime.freeze import network_lock

            network_lock.back(self._spec, made.state.id)
        self._released = True
        made.update(started=True, releasing=False)
        self._session.finish()
        self._session = None
        self._leeway.settle()
        self._network.settle(again=not self._plan.foreground)  # `run` stays, and waits for no child but the container
        return made.state

    def abort(self) -> None:
        """Kill the restored tree and remove everything that `prepare` made; no effect once the tree was resumed."""
        if self._released:
            return
        made, monitor = self._made, self._criu.monitor
        made.disconnect()  # first: what exits now sends nothing from this host
        self._network.close()
        if self._session is not None:
            self._session.abort()
            self._session = None
        self._criu.close()
        if monitor is not None:
            self._await_criu()
        made.kill()  # a CRIU that was killed has not killed the tree that it restored
        if monitor is not None:
            monitor.abandon()
        made.remove(run_hooks=self._hooked)

    def _await_criu(self) -> None:
        """Let CRIU remove the names that it has made among the container's files: the next restore trips over them.

        A stopped monitor does not reap it.
        """
        deadline = time.monotonic() + CRIU_UNDO_TIMEOUT
        state = self._made.state
        monitor, own = (state.monitor_pid, state.monitor_start_time), {state.pid}
        while time.monotonic() < deadline:
            if all(map(processes.is_dying, processes.children(*monitor) - own)):
                return
            time.sleep(0.005)

    @staticmethod
    def left_behind(store: Store, container_id: str, move: str, timeout: float) -> State | None:
        """Find out what has become of a restore for the migration `move` whose process died.

        Returns the container's state if it was resumed (it may have exited since). Otherwise removes what is left of it
        and returns None. Raises DeadlineExceeded when CRIU or the monitor does not exit within `timeout` seconds.
        """
        try:
            state = store.look(container_id)
        except NotFound:
            return None
        if state.move != move:
            return None
        deadline = time.monotonic() + timeout
        while processes.children(state.monitor_pid, state.monitor_start_time) - {state.pid}:  # CRIU is still at work
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the restore of {container_id} for migration {move} did not end within {timeout:g} s"
                )
            time.sleep(0.02)
        # An init that lives without CRIU was not necessarily resumed: its monitor may be about to kill it.
        if state.releasing and processes.runs(state.pid, state.pid_start_time):
            state = state.replace(started=True, releasing=False)
            store.save(state)
        if state.started:
            return state
        delete.remove(store, state)
        return None
