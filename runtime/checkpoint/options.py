"""The CRIU options for dumping a container.

CRIU does not handle these, because that is cheaper or safer:
- the network namespace is external: a restore makes it with `lo` up before anything is frozen. Only CRIU can make a
  namespace that belongs to a user namespace of the container. CRIU leaves it empty, and the restore fills it;
- cgroups are ignored: the restored tree is born in the container's new cgroup (checkpoint/criu_launcher.py);
- standard streams that are pipes: a restored container inherits other pipes in their place.

Bind mounts are external as well, named by their mount point.
"""

from __future__ import annotations

import os

from criu_rpc import image_codec
from criu_rpc.options import DumpOptions
from runtime import notices
from runtime.cgroups.hierarchies import UNIFIED, discover
from runtime.errors import SpecError
from runtime.freeze import unfreezable
from runtime.light import json as light_json
from runtime.linux import namespaces, syscalls
from runtime.spec.annotations import CRIU_CONFIG
from runtime.state.status import ALIVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from runtime.spec.config import Spec
    from runtime.state.record import State

NETNS_KEY = "pymigrate-net"
DESCRIPTORS = "descriptors.json"  # the standard streams at the dump, in the form of runc's images
GHOST_LIMIT = 512 << 20  # bytes on disk of an open file without a name that the images hold
_HOST_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def is_own_network(spec: Spec) -> bool:
    """Whether the container has its own network namespace, which a restore makes again."""
    return spec.is_new("network") and "user" not in spec.namespaces


def is_users_network(spec: Spec) -> bool:
    """Whether the container has its own network namespace, which belongs to its user namespace."""
    return spec.is_new("network") and "user" in spec.namespaces


def joined(spec: Spec) -> dict[str, str]:
    """Return the namespaces that the container joined by a path: type -> path."""
    return {kind: path for kind, path in spec.namespaces.items() if path is not None}


def bind_mounts(spec: Spec) -> dict[str, str]:
    """Return the bind mounts whose source is outside the container: mount point -> source on the host."""
    return {mount.destination.rstrip("/"): os.path.realpath(mount.source) for mount in spec.mounts if mount.is_bind}


def external_mounts(spec: Spec, cgroup_paths: dict[str, str]) -> dict[str, str]:
    """Return everything outside that is mounted inside: bind mounts, and those that init/mounts.py makes."""
    found = bind_mounts(spec)
    if "user" in spec.namespaces:
        found |= {f"/dev/{name}": f"/dev/{name}" for name in _HOST_DEVICES}
        found |= {device.path: device.path for device in spec.devices}
    # A cgroup namespace is made before the user namespace, whose root may therefore not mount its hierarchies.
    if "cgroup" not in spec.namespaces or "user" in spec.namespaces:
        for mount in spec.mounts:
            if mount.type == "cgroup":
                found |= _cgroup_binds(mount.destination.rstrip("/"), cgroup_paths)
    return found


def _cgroup_binds(place: str, paths: dict[str, str]) -> dict[str, str]:
    if set(paths) == {UNIFIED}:
        return {place: paths[UNIFIED]}
    return {
        f"{place}/{os.path.basename(hierarchy.mountpoint)}": paths[hierarchy.controllers[0]]
        for hierarchy in discover()
        if hierarchy.controllers != (UNIFIED,) and hierarchy.controllers[0] in paths
    }


def mount_points(state: State, spec: Spec) -> dict[str, str]:
    """Return the mount points of external mounts, by which CRIU names them: destination in the bundle -> mount point.

    They differ where a destination leads through a symbolic link, as /var/run does. A link that does not lead to the
    mount was changed by the container later, and is ignored.
    """
    root = os.open(f"/proc/{state.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        outside = external_mounts(spec, state.cgroup_paths)
        return {destination: _mount_point(root, destination, source) for destination, source in outside.items()}
    finally:
        os.close(root)


def _mount_point(root: int, destination: str, source: str) -> str:
    try:
        fd = syscalls.open_in_root(root, destination, os.O_PATH)
    except OSError:
        return destination
    try:
        place = os.readlink(f"/proc/self/fd/{fd}")
        same = place == destination or os.path.samestat(os.fstat(fd), os.stat(source))
        return place if same else destination
    except OSError:
        return destination
    finally:
        os.close(fd)


def dump_options(state: State, spec: Spec, carried: Iterable[str] = (), **more: Any) -> DumpOptions:
    """Return the options to dump this container; `more` are further DumpOptions. The caller owns the descriptors.

    `carried`: mount points whose contents are sent separately, not in the images.
    """
    external = [f"mnt[{place}]:{destination}" for destination, place in mount_points(state, spec).items()]
    external += [f"mnt[{place}]:{place}" for place in carried]
    foreign = set(joined(spec)) | ({"network"} if is_own_network(spec) else set())
    for kind in sorted(foreign):
        file = namespaces.FILES[kind]
        inode = os.stat(f"/proc/{state.pid}/ns/{file}").st_ino
        external.append(f"{file}[{inode}]:{external_key(kind)}")
    try:
        external.append(image_codec.tty_external(os.stat(f"/proc/{state.pid}/root/dev/tty").st_dev))
    except OSError:
        pass  # the container has no /dev/tty
    own = {"ghost_limit": GHOST_LIMIT, "seize_timeout": unfreezable.seize_timeout(state.pid)}
    options = common_options(spec) | own | more
    return DumpOptions(
        pid=state.pid, root=state.rootfs, external=tuple(external), orphan_pts_master=spec.process.terminal, **options
    )  # fmt: skip


def common_options(spec: Spec) -> dict[str, Any]:
    """Return the default options that a dump and a restore of a container share."""
    options: dict[str, Any] = {"tcp_established": True, "file_locks": True, "link_remap": True}
    return options | ({"empty_ns": syscalls.CLONE_NEWNET} if is_users_network(spec) else {})


def external_key(kind: str) -> str:
    """Return the name of an external namespace in the images."""
    return NETNS_KEY if kind == "network" else f"pymigrate-{kind}"


def warn_of_config(spec: Spec) -> None:
    """Warn of a configuration file that runc would have CRIU obey: with an engine, an image may name it."""
    if spec.annotations.get(CRIU_CONFIG):
        notices.warn(
            f"annotations.{CRIU_CONFIG}: is ignored: CRIU runs the programs that such a file names; give flags"
        )


def write_descriptors(images: str, stdio: tuple[str, ...]) -> None:
    fd = os.open(os.path.join(images, DESCRIPTORS), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(light_json.dumps(list(stdio)))


def read_descriptors(images: str) -> tuple[str, ...]:
    """Return the names of the standard streams at the dump. Raises SpecError."""
    path = os.path.join(images, DESCRIPTORS)
    try:
        with open(path, "rb") as file:
            names = light_json.loads(file.read())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > 3:
        raise SpecError(f"{path}: must be an array of three strings")
    return tuple(names)


def is_running(state: State) -> bool:
    """Whether the container's init is alive."""
    return state.status in ALIVE
