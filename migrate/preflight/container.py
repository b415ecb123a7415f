"""List every reason why a container cannot move, all at once, before anything is changed."""

import os

from migrate.files import mountinfo
from migrate.preflight import filesystems, silent_losses, sockets
from migrate.preflight import processes as process_scan
from migrate.preflight.hostfacts import can_carry_any_uid
from migrate.preflight.rules import Blocker, raise_blocked
from runtime.checkpoint import options as criu_options
from runtime.freeze import unfreezable
from runtime.limits import MEMORY_PATIENCE
from runtime.linux import processes
from runtime.spec.config import Spec
from runtime.state import lazy
from runtime.state.record import State


def container_blockers(state: State, spec: Spec, *, tcp_close: bool = False, patience: float = 0.0) -> list[Blocker]:
    """Return the reasons not to move this container, whatever the target is.

    Wait `patience` seconds for those to pass that may pass by themselves (sockets.PASSING, unfreezable), and
    MEMORY_PATIENCE for memory that is still coming into the container. `tcp_close`:
    the container's connections may be lost.
    """
    found: list[Blocker] = []
    if spec.seccomp:
        found.append(Blocker("seccomp", "config.json: linux.seccomp", "a seccomp filter is configured"))
    if spec.process.terminal:
        found.append(Blocker("terminal", "config.json: process.terminal", "is true"))
    if not spec.readonly:
        found.append(
            Blocker(
                "writable-rootfs",
                "config.json: root.readonly",
                "is not true: the container's changes to its root file system would have to be sent",
            )
        )
    if not os.path.isdir(os.path.join(state.rootfs, "tmp")):
        found.append(Blocker("rootfs-tmp", f"{state.rootfs}/tmp", "is not a directory"))
    status = state.status
    if not status.allows("move"):
        found.append(Blocker("status", f"container {state.id}", f"is {status}"))
        return found
    missing = lazy.await_whole(state, MEMORY_PATIENCE if patience else 0.0)
    if missing is not None:
        rule = "memory-damaged" if missing.is_damaged else "memory-left"
        found.append(Blocker(rule, f"container {state.id}", missing.problem))
    if not spec.is_new("pid"):
        found.append(Blocker("host-pid", "config.json: linux.namespaces", "has no new pid namespace"))
        return found
    if spec.is_new("network"):  # a joined namespace has its own interfaces at the target
        found += [
            Blocker("network-device", f"interface {name}", "is in the container's network namespace")
            for name in process_scan.network_devices(state.pid)
            if spec.network is None or name != spec.network.name
        ]
    found += [
        Blocker(
            "joined-namespace",
            "config.json: linux.namespaces",
            f"the {kind} namespace is given by a process of this host: {path}",
        )
        for kind, path in criu_options.joined(spec).items()
        if path.startswith("/proc/")
    ]
    found += _submounts(state, spec)
    known = {blocker.where for blocker in found if blocker.rule == "submount"}
    external = criu_options.mount_points(state, spec).values()
    found += [blocker for blocker in filesystems.blockers(state.pid, external) if blocker.where not in known]
    survey = sockets.settled(state.pid, patience)
    if "network" not in spec.namespaces and not tcp_close:
        found += _host_connections(survey)
    found += survey.blockers
    found += _unfreezable(state, patience)
    if not spec.is_new("ipc"):
        problem = "has no new ipc namespace: System V and POSIX IPC objects would be left behind"
        found.append(Blocker("host-ipc", "config.json: linux.namespaces", problem))
    else:
        found += silent_losses.ipc(state.pid, processes.container_pids(state.pid))
    found += silent_losses.keys(state.id)
    known = {"other-uid"} if can_carry_any_uid() else set()
    if spec.seccomp:
        known.add("seccomp")  # reported for the container above
    found += [blocker for blocker in process_scan.scan(state.pid) if blocker.rule not in known]
    return found


def _unfreezable(state: State, patience: float) -> list[Blocker]:
    return [Blocker("unfreezable", stuck.subject, stuck.problem) for stuck in unfreezable.find(state.pid, patience)]


def _host_connections(survey: sockets.Survey) -> list[Blocker]:
    """Return a blocker for each connection that uses this host's own addresses, which cannot move."""
    text = "uses an address of this host, which cannot move"
    return [
        Blocker("host-network", connection.held_by, f"{connection} {text}")
        for connection in survey.connections
        if not connection.inside
    ]


def _submounts(state: State, spec: Spec) -> list[Blocker]:
    """Return a blocker for each mount below a recursive bind mount, because CRIU wants each of them named."""
    places = criu_options.mount_points(state, spec)
    binds = [places[destination] for destination in criu_options.bind_mounts(spec)]
    known = {places.get(place, place) for place in (mount.destination.rstrip("/") for mount in spec.mounts)}
    return [
        Blocker("submount", mount.place, "is mounted below a bind mount")
        for mount in mountinfo.read(state.pid)
        if mount.place not in known and any(mount.place.startswith(f"{bind}/") for bind in binds)
    ]


def wait_settled(state: State, allow: frozenset[str], patience: float) -> None:
    """Wait, right before a dump, until no passing reason is left. Raises Blocked after `patience` seconds."""
    left = sockets.passing(sockets.settled(state.pid, patience, allow), allow)
    raise_blocked(state, left + _unfreezable(state, patience), allow, "")


def require_movable(state: State, spec: Spec, allow: frozenset[str], patience: float) -> None:
    """Raise Blocked if the container cannot be dumped and restored, even on this host (for a snapshot)."""
    raise_blocked(state, container_blockers(state, spec, patience=patience), allow, "")
