"""What speaks against a target."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from criu_rpc.errors import CriuError
from migrate.errors import ProtocolError
from migrate.files import fingerprint as fingerprints
from migrate.preflight import hostfacts, limits, open_files, sockets
from migrate.preflight import processes as process_scan
from migrate.preflight.hostfacts import can_carry_any_uid, gather
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

TREES_TIMEOUT = 600.0
SPARE_BYTES = 64 << 20  # for images that are not memory


def target_blockers(
    source: HostFacts,
    target: HostFacts,
    state: State,
    needed: int,
    *,
    send_rootfs: bool,
    joined: Mapping[str, str] = MappingProxyType({}),
) -> list[Blocker]:
    """What speaks against this target; `needed` is how many bytes it must take, `joined` are checkpoint.joined's."""
    found: list[Blocker] = []
    name = target.name
    if target.id_in_use:
        itself = "; the host has the name of this one: is it this one?" if name == source.name else ""
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
                f"has criu {target.criu}, the source {source.criu}: images are not sure to be understood",
            )
        )
    if target.cpu_problem and not target.criu_problem:
        found.append(Blocker("cpu", name, target.cpu_problem))
    kinds = {path: kind for kind, path in joined.items()}
    for path in target.missing:
        if path in kinds:
            problem = f"does not exist: the container is in the {kinds[path]} namespace that is there at {source.name}"
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
    """What must exist at a target beside files: namespaces joined by path, hooks."""
    joined = [path for path in criu_options.joined(spec).values() if not path.startswith("/proc/")]  # they block anyway
    hooks = [hook.path for point in ("prestart", "createRuntime", "poststop") for hook in spec.hooks[point]]
    return tuple(dict.fromkeys([*joined, *hooks]))


def check_target(peer: "Peer", store: Store, state: State, spec: Spec, plan: Plan) -> tuple[list[Blocker], Plan]:
    """Ask the target and compare it with this host; the plan for the trees as it is with what the target has."""
    source = gather(FactsQuery())
    if source.criu_problem:
        raise CriuError(f"{source.name}: {source.criu_problem}", remedy="run vagrant/provision.sh here")
    net = spec.network.text() if spec.network is not None else ""
    query = FactsQuery(state.id, str(store.root), external_paths(spec), source.cpuinfo, net)
    target = dataclasses.replace(hostfacts.ask(peer, query), name=peer.name)
    needed = process_scan.memory_bytes(state.pid) + SPARE_BYTES if state.status is Status.RUNNING else 0
    needed += fingerprints.size(Path(state.rootfs))
    found = target_blockers(source, target, state, needed, send_rootfs=True, joined=criu_options.joined(spec))
    other = [there for there in target.overlay if there not in source.overlay] if source.overlay else []
    if other and any(mount.type == "overlay" for mount in spec.mounts):
        text = f"has {', '.join(other)}, unlike here: mount options that nobody has said would change"
        found.append(Blocker("overlay-defaults", f"{target.name}: /sys/module/overlay/parameters", text))
    if state.status is Status.RUNNING:
        if not spec.is_new("network"):
            found += _check_ports(peer, state, spec)
        more, plan = _check_trees(peer, state, plan, needed)
        found += more + _check_limits(state, spec, target)
    return found, plan


def _check_limits(state: State, spec: Spec, target: HostFacts) -> list[Blocker]:
    """Can the target give back the limits of the container's processes, and can they leave it again?"""
    remapped = "user" in spec.namespaces  # what CRIU restores there has no capability of the host's
    found = limits.blockers(state.pid, target.name, target.limits) if remapped or not target.any_uid else []
    if can_carry_any_uid() and not target.any_uid and (who := limits.other_users(state.pid)):
        text = f"runs as another user: root of {target.name} lacks CAP_SYS_RESOURCE, and CRIU cannot dump it there"
        found.append(Blocker("one-way", who, text))
    if not remapped:  # there root has all of them in the namespace that CRIU makes
        found += limits.lacking(state.pid, target.name, target.capabilities)
    return found


def _check_ports(peer: "Peer", state: State, spec: Spec) -> list[Blocker]:
    """Are the ports free at the target that the container has in a network which is not its own?"""
    ports = sockets.bound(state.pid)
    if not ports:
        return []
    found = peer.call(protocol.CheckPorts(spec.namespaces.get("network") or "", ports)).problems
    return [Blocker("port-in-use", f"{peer.name}: {problem.port}", problem.text) for problem in found]


def _check_trees(peer: "Peer", state: State, plan: Plan, reserved: int) -> tuple[list[Blocker], Plan]:
    """Can what goes along be put there, is there what does not, and is it the same as far as it is in use?"""
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
    """What speaks against the plan for the trees, whatever the target is."""
    return list(plan.problems)


def preflight(
    peer: "Peer", store: Store, state: State, spec: Spec, allow: frozenset[str], blockers: list[Blocker], plan: Plan
) -> Plan:
    """Raise Blocked with everything that speaks against the move, `blockers` of the container included."""
    found, checked = check_target(peer, store, state, spec, plan)
    raise_blocked(state, blockers + plan_blockers(plan) + found, allow, peer.name)
    return checked
