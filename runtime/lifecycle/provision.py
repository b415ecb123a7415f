"""What a container gets before its first process: spec, cgroup, network, hooks for later."""

from __future__ import annotations

import os
import time

from criu_rpc.errors import Error
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.limits import denied_by_default, may_deny_devices
from runtime.errors import DeadlineExceeded, SpecError, StartFailed
from runtime.spec.annotations import NET
from runtime.spec.config import load
from runtime.spec.resources import Resources
from runtime.state.record import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.spec.config import Spec
    from runtime.spec.network import Network
    from runtime.state.store import Store

_CLAIM_TIMEOUT = 10.0
_LATER = ("poststart", "poststop")


def load_asked(bundle: str, net: str | None, pid_file: str | None) -> Spec:
    """The spec of a bundle for whoever makes a container of it, with what --net and --pid-file say. Raises SpecError.

    Who asks for a pid file is an engine as a rule, and its config.json no word of the operator's: older podman
    copies an image's annotations there, others those of whoever may start a pod.
    """
    spec = load(bundle, net=net)
    if net is None and pid_file is not None and NET in spec.annotations:
        raise SpecError(
            f"annotations.{NET}: is not heeded together with --pid-file, as engines call it: it may be an image's",
            remedy="give --net; with an engine, its own networks",
        )
    return spec


def limit_reached(cgroup: Cgroup, resources: Resources) -> str | None:
    """The limit that has probably kept the container's init from being set up: a field, and what it did."""
    limits = {"memory": resources.memory_limit, "pids": resources.pids_limit}
    words = {"memory": "the kernel has no more memory for it", "pids": "it may not fork any more"}
    for kind in cgroup.limits_reached():
        limit = limits[kind]
        field = f"linux.resources.{kind}.limit" if limit is not None else "linux.cgroupsPath"
        return f"{field}: {limit if limit is not None else cgroup.directories()[0]}: {words[kind]}"
    return None


def make_cgroup(store: Store, state: State, spec: Spec, *, systemd: bool) -> tuple[State, Cgroup]:
    """Make a new container's cgroup and set its limits; the state says where it is. Raises ContainerError.

    The state is saved before anything is made, so that whoever finds it after we were killed can remove all.
    """
    resources = denied_by_default(spec.resources) if may_deny_devices() else spec.resources
    if os.geteuid() and resources == Resources():
        store.save(state)  # without privileges, and without limits to set, there is none
        return state, Cgroup({})
    if not systemd:
        planned = Cgroup.planned(state.id, spec.cgroups_path)
        Cgroup(planned).require_free()  # what is in there must not become this container's, to be killed with it
        state = state.replace(cgroup_paths=planned)
        store.save(state)
        cgroup = Cgroup.create(state.id, spec.cgroups_path, owner=state.owner)
    else:
        store.save(state)
        cgroup = Cgroup.create(
            state.id, spec.cgroups_path, systemd=True, resources=resources, annotations=spec.annotations,
            owner=state.owner,
        )  # fmt: skip
        state = state.replace(cgroup_paths=cgroup.paths, systemd_unit=cgroup.unit)
        store.save(state)
    try:
        cgroup.apply(resources)
    except BaseException:
        remove_cgroup(cgroup)
        raise
    return state, cgroup


def remove_cgroup(cgroup: Cgroup) -> None:
    """After a failure, which says more than one of these would."""
    kill_cgroup(cgroup)
    try:
        cgroup.remove()
    except Error:
        pass


def kill_cgroup(cgroup: Cgroup) -> None:
    """Likewise: end the processes in it."""
    try:
        cgroup.kill()
    except Error:
        pass


def claim_network(store: Store, state: State, wanted: Network) -> None:
    """Save a new container's state, which says what network it has.

    Raises Conflict when another container has that, and removes the new one. Of two that ask at the same time one has
    saved its state before the other one looks.
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
    """Raises DeadlineExceeded."""
    import fcntl

    deadline = time.monotonic() + _CLAIM_TIMEOUT
    while True:
        try:
            return fcntl.flock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{path}: another pymigrate is about to give a container a network") from None
            time.sleep(0.005)


def remove_network(state: State) -> None:
    """After a failure, as remove_cgroup."""
    if state.has_bridge:
        from runtime.network import veth

        try:
            veth.remove(state)
        except (Error, OSError):
            pass


def connect_network(state: State, wanted: Network, *, again: bool) -> None:
    """Build the network of an init that waits, and announce it, `again` and again."""
    from runtime.network import announce, veth

    try:
        netns = os.open(f"/proc/{state.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StartFailed("the container's init ended while it was being set up") from None
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
    """The time, as runc writes it into states: UTC, to the nanosecond."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09d}Z"


def later_hooks(spec: Spec) -> dict[str, Any]:
    """For the state: the hooks that are run when the bundle may be gone."""
    return {point: [hook.plain() for hook in spec.hooks[point]] for point in _LATER if spec.hooks[point]}
