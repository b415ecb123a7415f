"""What `create` and a restore give a container before its first process: directory, state, network and cgroup."""

from __future__ import annotations

import os
import time

from criu_rpc.errors import Error
from runtime.cgroups import monitor as monitor_cgroup
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.limits import denied_by_default, may_deny_devices
from runtime.errors import DeadlineExceeded, SpecError, StartFailed
from runtime.init import hooks
from runtime.limits import NETWORK_CLAIM_TIMEOUT
from runtime.linux import namespaces, processes
from runtime.spec.annotations import NET
from runtime.spec.config import load
from runtime.spec.resources import Resources
from runtime.state.kept_config import keep
from runtime.state.record import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.spec.config import Spec
    from runtime.spec.network import Network
    from runtime.state.store import Store

_LATER = ("poststart", "poststop")


def load_asked(bundle: str, net: str | None, pid_file: str | None) -> Spec:
    """Return the spec of a bundle that becomes a container, as --net and --pid-file change it. Raises SpecError.

    A caller that asks for a pid file usually is an engine, and its config.json does not speak for the operator: older
    podman copies an image's annotations there, other engines those of any user that may start a pod.
    """
    spec = load(bundle, net=net)
    if net is None and pid_file is not None and NET in spec.annotations:
        raise SpecError(
            f"annotations.{NET}: is ignored together with --pid-file, which engines use: it may come from an image",
            remedy="give --net; with an engine, its own networks",
        )
    return spec


class Provision:
    """A new container's directory, state, network claim and cgroup, from before its first process until it runs.

    `create` and a restore make their containers of it. `state` is what state.json holds; it is saved before the cgroup
    is made, so that `delete` can remove everything if this process is killed.
    """

    def __init__(self, store: Store, spec: Spec, container_id: str, bundle: str, **fields: Any) -> None:
        """Make the directory and claim the network; `fields` are further fields of the state.

        Raises Conflict when the id or an address is in use; nothing is left then.
        """
        if spec.network is not None:
            from runtime.spec import config as spec_config

            spec = spec_config.with_mac(spec)
        directory = store.create(container_id)
        own: dict[str, Any] = {"rootfs": os.path.realpath(spec.root), "created": now()}
        self.store, self.spec = store, spec
        self.cgroup = Cgroup({})
        self.state = State(
            id=container_id,
            bundle=bundle,
            log_path=directory + "/log",
            annotations=spec.annotations,
            hooks=later_hooks(spec),
            **own | fields,
        )
        if spec.network is not None:
            claim_network(store, self.state, spec.network)

    def update(self, **changes: Any) -> None:
        """Change fields of the state, and save it."""
        self.state = self.state.replace(**changes)
        self.store.save(self.state)

    def set_up(self, *, systemd: bool) -> None:
        """Keep config.json, make the cgroup and set its limits. Raises ContainerError."""
        spec, state = self.spec, self.state
        keep(spec, state.directory)
        resources = denied_by_default(spec.resources) if may_deny_devices() else spec.resources
        if os.geteuid() and resources == Resources():
            self.store.save(state)  # without privileges, and without limits to set, there is no cgroup
            return
        if not systemd:
            planned = Cgroup.planned(state.id, spec.cgroups_path)
            Cgroup(planned).require_free()  # processes in it must not become this container's, to be killed with it
            self.update(cgroup_paths=planned)
            self.cgroup = Cgroup.create(state.id, spec.cgroups_path, owner=state.owner)
        else:
            self.store.save(state)
            self.cgroup = Cgroup.create(
                state.id, spec.cgroups_path, systemd=True, resources=resources, annotations=spec.annotations,
                owner=state.owner,
            )  # fmt: skip
            self.update(cgroup_paths=self.cgroup.paths, systemd_unit=self.cgroup.unit)
        self.cgroup.apply(resources)

    def add_monitor(self, pid: int, stdio: tuple[str, str, str]) -> None:
        """Note the init's standard streams and its monitor, process `pid`; 0 when the caller is the monitor."""
        self.state = self.state.replace(stdio=stdio)
        if pid:
            if self.cgroup.unit is not None:
                monitor_cgroup.add(self.cgroup, pid)
            self.state = self.state.replace(monitor_pid=pid, monitor_start_time=processes.start_time(pid))

    def add_init(self, pid: int) -> None:
        """Save that the container has an init; its cgroup needs no claim from here on."""
        self.cgroup.release_claim()
        start, paths = processes.start_time(pid), namespaces.paths(pid)
        self.update(pid=pid, pid_start_time=start, namespace_paths=paths)

    def disconnect(self) -> None:
        """Remove the network after a failure. Raises nothing: the failure says more."""
        if self.state.has_bridge:
            from runtime.network import veth

            try:
                veth.remove(self.state)
            except (Error, OSError):
                pass

    def kill(self) -> None:
        """Kill every process in the cgroup after a failure. Raises nothing: the failure says more."""
        try:
            self.cgroup.kill()
        except Error:
            pass

    def remove(self, *, run_hooks: bool) -> None:
        """Remove cgroup and directory after a failure; run the poststop hooks between, as after any other end.

        (runtime.md, lifecycle, steps 3 to 13.)
        """
        self.kill()
        try:
            self.cgroup.remove()
        except Error:
            pass
        if run_hooks:
            hooks.run_all("poststop", self.spec.hooks["poststop"], self.state.oci("stopped"))
        self.store.remove(self.state.id)


def limit_reached(cgroup: Cgroup, resources: Resources) -> str | None:
    """Return the limit that has probably prevented the init's set-up, in words: the field, and its effect."""
    limits = {"memory": resources.memory_limit, "pids": resources.pids_limit}
    words = {"memory": "the kernel has no more memory for it", "pids": "it may not fork again"}
    for kind in cgroup.limits_reached():
        limit = limits[kind]
        field = f"linux.resources.{kind}.limit" if limit is not None else "linux.cgroupsPath"
        return f"{field}: {limit if limit is not None else cgroup.directories()[0]}: {words[kind]}"
    return None


def claim_network(store: Store, state: State, wanted: Network) -> None:
    """Save a new container's state, which names its network.

    Raises Conflict, and removes the new container, if another one has the network. Of two that ask at the same time,
    one has saved its state before the other looks.
    """
    from runtime.network import claims

    root = os.open(store.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(root, store.root)
        claims.require_free(store, wanted, state.id)
        store.save(state)
    except BaseException:
        store.remove(state.id)
        raise
    finally:
        os.close(root)


def _lock(root: int, path: str) -> None:
    """Lock the root. Raises DeadlineExceeded."""
    import fcntl

    deadline = time.monotonic() + NETWORK_CLAIM_TIMEOUT
    while True:
        try:
            return fcntl.flock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{path}: another process is giving a container a network") from None
            time.sleep(0.005)


def connect_network(state: State, wanted: Network, *, again: bool) -> None:
    """Build the network of a waiting init, and announce it; `again`: a process of its own repeats that."""
    from runtime.network import announce, veth

    try:
        netns = os.open(f"/proc/{state.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StartFailed("the container's init exited while it was being set up") from None
    try:
        veth.build(state, wanted, netns)
        veth.attach(state, wanted)
        # Neighbours may remember another container that had these addresses.
        announcer = announce.Announcer(wanted, netns)
        announcer.send()
        if again:
            announcer.repeat()
        announcer.close()
    finally:
        os.close(netns)


def now() -> str:
    """Return the time as runc writes it into states: UTC, to the nanosecond."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def later_hooks(spec: Spec) -> dict[str, Any]:
    """Return the hooks that run when the bundle may be gone, in the form of the state."""
    return {point: [hook.plain() for hook in spec.hooks[point]] for point in _LATER if spec.hooks[point]}
