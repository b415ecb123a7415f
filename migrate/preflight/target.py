"""List every reason why a container cannot move to a given target."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from criu_rpc.errors import CriuError
from migrate.errors import ProtocolError
from migrate.files import fingerprint as fingerprints
from migrate.limits import TREES_TIMEOUT
from migrate.preflight import hostfacts, limits, open_files, sockets
from migrate.preflight import processes as process_scan
from migrate.preflight.hostfacts import can_carry_any_uid
from migrate.preflight.rules import RULES, Blocker, raise_blocked
from migrate.preflight.volumes import Plan
from migrate.wire import protocol
from migrate.wire.pages import has_wide_records
from migrate.wire.questions import FactsQuery, HostFacts
from runtime.checkpoint import options as criu_options
from runtime.spec.config import Spec
from runtime.state.record import State
from runtime.state.status import Status
from runtime.state.store import Store

if TYPE_CHECKING:
    from migrate.wire.peer import Peer

SPARE_BYTES = 64 << 20  # for images that are not memory


def target_blockers(
    source: HostFacts,
    target: HostFacts,
    state: State,
    needed: int,
    *,
    send_rootfs: bool,
    memory: int = 0,
    joined: Mapping[str, str] = MappingProxyType({}),
) -> list[Blocker]:
    """Return the reasons not to move to this target, by the facts of both hosts.

    `needed`: bytes that it must have room for on its disk; `memory`: bytes of the container's memory; `joined`: see
    runtime.checkpoint.options.joined.
    """
    found: list[Blocker] = []
    name = target.name
    if target.id_in_use:
        itself = "; the target has the same name as this host: is it this host?" if name == source.name else ""
        found.append(Blocker("id-in-use", f"{name}: container {state.id}", f"exists already{itself}"))
    if (target.machine, target.bits) != (source.machine, source.bits):
        found.append(
            Blocker(
                "architecture",
                name,
                f"is {target.machine} ({target.bits} bits), not {source.machine} ({source.bits} bits)",
            )
        )
    if not target.criu or target.criu_problem:
        found.append(Blocker("criu", name, target.criu_problem or "criu is not installed"))
    elif has_wide_records(_version(target.criu)) != has_wide_records(_version(source.criu)):
        problem = (
            f"has criu {target.criu}, the source {source.criu}: their page streams differ (4.2 changed the format)"
        )
        found.append(Blocker("criu-protocol", name, problem))
    elif _version(target.criu) < _version(source.criu):
        found.append(
            Blocker(
                "criu-version",
                name,
                f"has criu {target.criu}, older than the source's {source.criu}: it may not understand the images",
            )
        )
    if target.cpu_problem and not target.criu_problem:
        found.append(Blocker("cpu", name, target.cpu_problem))
    kinds = {path: kind for kind, path in joined.items()}
    for path in target.missing:
        if path in kinds:
            problem = f"does not exist: at {source.name} the container is in the {kinds[path]} namespace at this path"
            found.append(Blocker("joined-namespace", f"{name}: {path}", problem))
        else:
            found.append(Blocker("missing-source", f"{name}: {path}", "does not exist"))
    if target.bridge_problem:
        found.append(Blocker("bridge", name, target.bridge_problem))
    if target.address_problem:
        found.append(Blocker("address-in-use", name, target.address_problem))
    if target.images_free < needed:
        found.append(
            Blocker(
                "no-space",
                f"{name}: /var/lib/pymigrate",
                f"has {target.images_free >> 20} MiB free, {needed >> 20} MiB are needed",
            )
        )
    if target.memory_free < memory:
        text = f"has {target.memory_free >> 20} MiB of memory available, the container has {memory >> 20} MiB"
        found.append(Blocker("no-memory", name, text))
    if send_rootfs and not (source.rsync and target.rsync):
        found.append(
            Blocker(
                "rsync",
                source.name if not source.rsync else name,
                "rsync is not installed, and the root file system may have to be sent",
            )
        )
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def external_paths(spec: Spec) -> tuple[str, ...]:
    """Return the paths that must exist at a target besides bind mounts: joined namespaces, hooks."""
    joined = [path for path in criu_options.joined(spec).values() if not path.startswith("/proc/")]  # they block anyway
    hooks = [hook.path for point in ("prestart", "createRuntime", "poststop") for hook in spec.hooks[point]]
    return tuple(dict.fromkeys([*joined, *hooks]))


def check_target(
    peer: "Peer", store: Store, state: State, spec: Spec, plan: Plan, source: HostFacts
) -> tuple[list[Blocker], Plan]:
    """Compare the target with this host, the `source`.

    Return the blockers, and the plan without the trees that the target has.
    """
    if source.criu_problem:
        raise CriuError(f"{source.name}: {source.criu_problem}", remedy="run vagrant/provision.sh here")
    net = spec.network.text() if spec.network is not None else ""
    query = FactsQuery(state.id, state.created, str(store.root), external_paths(spec), source.cpuinfo, net)
    target = hostfacts.ask(peer, query).replace(name=peer.name)
    memory = process_scan.memory_bytes(state.pid) if state.status is Status.RUNNING else 0
    needed = (memory and memory + SPARE_BYTES) + fingerprints.size(Path(state.rootfs))
    joined = criu_options.joined(spec)
    found = target_blockers(source, target, state, needed, send_rootfs=True, memory=memory, joined=joined)
    other = [there for there in target.overlay if there not in source.overlay] if source.overlay else []
    if other and any(mount.type == "overlay" for mount in spec.mounts):
        text = f"has {', '.join(other)}, unlike this host: the defaults of overlay mounts would change"
        found.append(Blocker("overlay-defaults", f"{target.name}: /sys/module/overlay/parameters", text))
    if state.status is Status.RUNNING:
        if not spec.is_new("network"):
            found += _check_ports(peer, state, spec)
        more, plan = _check_trees(peer, state, plan, needed)
        found += more + _check_limits(state, spec, target)
    return found, plan


def _check_limits(state: State, spec: Spec, target: HostFacts) -> list[Blocker]:
    """Check that the target can restore the limits of the container's processes and can dump them again."""
    remapped = "user" in spec.namespaces  # then CRIU restores without the host's capabilities
    found = limits.blockers(state.pid, target.name, target.limits) if remapped or not target.any_uid else []
    if can_carry_any_uid() and not target.any_uid and (subject := limits.other_users(state.pid)):
        text = f"runs as another user, and root of {target.name} lacks CAP_SYS_RESOURCE: CRIU could not dump it there"
        found.append(Blocker("one-way", subject, text))
    if not remapped:  # in a user namespace that CRIU makes root has all capabilities
        found += limits.lacking(state.pid, target.name, target.capabilities)
    return found


def _check_ports(peer: "Peer", state: State, spec: Spec) -> list[Blocker]:
    """Check that the ports which the container has in a network that is not its own are free at the target."""
    ports = sockets.bound(state.pid)
    if not ports:
        return []
    found = peer.call(protocol.CheckPorts(spec.namespaces.get("network") or "", ports)).problems
    return [Blocker("port-in-use", f"{peer.name}: {problem.port}", problem.text) for problem in found]


def _check_trees(peer: "Peer", state: State, plan: Plan, reserved: int) -> tuple[list[Blocker], Plan]:
    """Check that the target can take the trees that are sent, and has the files that are not: equal where in use."""
    if not (plan.trees or plan.needed):
        return [], plan
    plan = plan.measured()
    call = protocol.CheckTrees(state.id, state.created, list(plan.trees), list(plan.needed), reserved)
    answer = peer.call(call, TREES_TIMEOUT)
    found = [Blocker(problem.rule, f"{peer.name}: {problem.path}", problem.text) for problem in answer.problems]
    plan = plan.with_found(set(answer.found))
    if any(blocker.rule not in RULES for blocker in found):
        raise ProtocolError(f"{peer.name}: the answer to CheckTrees names an unknown rule")
    if not found:
        used = open_files.in_use(state.pid, plan.bound)
        wrong = open_files.differing(peer, used, TREES_TIMEOUT)
        found = [Blocker("file-differs", f"{peer.name}: {path}", text) for path, text in wrong]
    return found, plan


def plan_blockers(plan: Plan) -> list[Blocker]:
    """Return the reasons against the plan for the trees, whatever the target is."""
    return list(plan.problems)


def preflight(
    peer: "Peer", store: Store, state: State, spec: Spec, allow: frozenset[str], blockers: list[Blocker], plan: Plan,
    source: HostFacts,
) -> Plan:  # fmt: skip
    """Return the plan as checked with the target. Raises Blocked with all reasons not to move, `blockers` included.

    `source`: the facts of this host.
    """
    found, checked = check_target(peer, store, state, spec, plan, source)
    raise_blocked(state, blockers + plan_blockers(plan) + found, allow, peer.name)
    return checked
