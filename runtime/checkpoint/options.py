"""What of a container CRIU must be told at a dump, and runc's `checkpoint` made of it.

Kept out of CRIU's hands, because it is cheaper or sounder so:
- the network namespace is external: at a restore it is made anew with `lo` up before anything is frozen. One that
  belongs to a user namespace of the container can only be made by CRIU, which leaves it empty: we fill it then;
- cgroups are ignored: the restored tree is born in the container's new cgroup (checkpoint/criu_launcher.py);
- standard streams that are pipes: at a restore other pipes are inherited in their place.

What is bound into the container is external as well, and goes by the place where it is mounted.
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
DESCRIPTORS = "descriptors.json"  # the standard streams at the dump, as runc's images say them
GHOST_LIMIT = 512 << 20  # bytes on disk of an open file without a name that go with the images
_HOST_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def is_own_network(spec: Spec) -> bool:
    """Whether the container has a network namespace of its own that we make anew at a restore."""
    return spec.is_new("network") and "user" not in spec.namespaces


def is_users_network(spec: Spec) -> bool:
    """Whether the container has a network namespace of its own that belongs to its user namespace."""
    return spec.is_new("network") and "user" in spec.namespaces


def joined(spec: Spec) -> dict[str, str]:
    """Namespaces that the container joined by a path: type -> path."""
    return {kind: path for kind, path in spec.namespaces.items() if path is not None}


def bind_mounts(spec: Spec) -> dict[str, str]:
    """Mount point -> source on the host, of the bind mounts whose source lies outside the container."""
    return {mount.destination.rstrip("/"): os.path.realpath(mount.source) for mount in spec.mounts if mount.is_bind}


def external_mounts(spec: Spec, cgroup_paths: dict[str, str]) -> dict[str, str]:
    """Everything that lies outside and is mounted inside: bind mounts, and what we bind ourselves (init/mounts.py)."""
    found = bind_mounts(spec)
    if "user" in spec.namespaces:
        found |= {f"/dev/{name}": f"/dev/{name}" for name in _HOST_DEVICES}
        found |= {device.path: device.path for device in spec.devices}
    # A cgroup namespace is made before the user namespace, whose root then may not mount its hierarchies.
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
    """Where what is external is mounted: destination in the bundle -> mount point, which is what CRIU goes by.

    They differ where a destination leads through a symbolic link, as /var/run does. A link that does not lead to what
    was mounted has been changed by the container since: it does not count.
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
    """What CRIU must know to dump this container; `more` are further DumpOptions. The descriptors are the caller's.

    What lies in the mounts at `carried` goes along by other ways than the images.
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
        pass  # it has none
    own = {"ghost_limit": GHOST_LIMIT, "seize_timeout": unfreezable.seize_timeout(state.pid)}
    options = common_options(spec) | own | more
    return DumpOptions(
        pid=state.pid, root=state.rootfs, external=tuple(external), orphan_pts_master=spec.process.terminal, **options
    )  # fmt: skip


def common_options(spec: Spec) -> dict[str, Any]:
    """What a dump and a restore of a container have in common, where nothing else is asked for."""
    options: dict[str, Any] = {"tcp_established": True, "file_locks": True, "link_remap": True}
    return options | ({"empty_ns": syscalls.CLONE_NEWNET} if is_users_network(spec) else {})


def external_key(kind: str) -> str:
    """What an external namespace is called in the images."""
    return NETNS_KEY if kind == "network" else f"pymigrate-{kind}"


def warn_of_config(spec: Spec) -> None:
    """Say that runc would let CRIU obey another file: with an engine, its name may be an image's."""
    if spec.annotations.get(CRIU_CONFIG):
        notices.warn(f"annotations.{CRIU_CONFIG}: is not heeded: CRIU runs what such a file says; give flags instead")


def write_descriptors(images: str, stdio: tuple[str, ...]) -> None:
    fd = os.open(os.path.join(images, DESCRIPTORS), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(light_json.dumps(list(stdio)))


def read_descriptors(images: str) -> tuple[str, ...]:
    """The standard streams at the dump; Raises SpecError."""
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
    """Whether the container's init lives and is not stopped."""
    return state.status in ALIVE
