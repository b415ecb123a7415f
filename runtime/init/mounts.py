"""Build the container's file system tree: the order of steps, masked and read-only paths, pivot_root.

rootfs.py does the single steps. Everything is private to the container's mount namespace, and no mount of the host
stays visible, because CRIU could not dump the container otherwise.

What cannot be done in a user namespace (reach a bind mount's source, map its ids) is prepared before it is entered.
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.errors import StartFailed
from runtime.init.rootfs import Root
from runtime.init.stage import Change
from runtime.linux import syscalls
from runtime.linux.mount_flags import ATTR_IDMAP, MS_BIND, MS_PRIVATE, MS_RDONLY, MS_REC, MS_SHARED, MS_SLAVE
from runtime.spec.mounts import PROPAGATIONS, Device, Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec.config import Spec

# File systems that the SELinux policy labels by itself.
_UNLABELLED = ("proc", "sysfs", "cgroup", "cgroup2", "mqueue")
_ROOT = -1  # the root's key among the prepared trees; the others have their index in `mounts`

_DEFAULT_DEVICES = tuple(
    Device(path, "c", major, minor, 0o666, 0, 0)
    for path, major, minor in (
        ("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8), ("/dev/urandom", 1, 9),
        ("/dev/tty", 5, 0),
    )
)  # fmt: skip


def prepare(spec: Spec) -> dict[int, int]:
    """Copy the mounts that only the host's root can copy; return descriptors for `build`. Raises StartFailed."""
    trees: dict[int, int] = {}
    # An unprivileged user may not copy mounts, but reaches the same paths in a user namespace as before.
    entering = "user" in spec.namespaces and os.geteuid() == 0
    for index, mount in enumerate(spec.mounts):
        if mount.is_bind and (mount.idmap or entering):
            try:
                trees[index] = syscalls.open_tree(mount.source, recursive=mount.recursive)
                if mount.idmap:
                    _map_ids(trees[index], mount, spec)
            except OSError as error:
                raise StartFailed(f"mounts[{index}] ({mount.destination}): {mount.source}: {error.strerror}") from None
    if entering:
        trees[_ROOT] = syscalls.open_tree(spec.root, recursive=True)
    return trees


def _map_ids(tree: int, mount: Mount, spec: Spec) -> None:
    from runtime.init import idmaps

    uids, gids = mount.uid_mappings or spec.uid_mappings, mount.gid_mappings or spec.gid_mappings
    userns = idmaps.namespace(uids, gids)
    try:
        syscalls.mount_setattr(
            tree, set=ATTR_IDMAP, clear=0, recursive=mount.idmap == "ridmap", userns_fd=userns
        )  # fmt: skip
    except OSError as error:
        raise OSError(error.errno, f"ids cannot be mapped on this mount: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(userns)


def build(spec: Spec, trees: dict[int, int], own_cgroups: dict[str, str]) -> Root:
    """Set up all mounts and devices below the root file system, in the container's mount namespace.

    `trees` comes from `prepare`; `own_cgroups` are the container's directories, shown if it has no cgroup namespace.
    Change the working directory to the root file system, and return it for `protect`. Raises StartFailed.
    """
    root = _mount_root(spec, trees.get(_ROOT))
    shown = None if "cgroup" in spec.namespaces else own_cgroups
    for index, mount in enumerate(spec.mounts):
        try:
            root.mount(_labelled(mount, spec.mount_label), trees.get(index), shown)
        except OSError as error:
            raise StartFailed(f"mounts[{index}] ({mount.destination}): {error.strerror or error}") from None
    make = root.bind_device if "user" in spec.namespaces else root.make_device
    for device in (*_DEFAULT_DEVICES, *spec.devices):
        try:
            make(device)
        except OSError as error:
            raise StartFailed(f"linux.devices ({device.path}): {error.strerror or error}") from None
    root.make_links()
    root.enter()
    return root


def _labelled(mount: Mount, label: str | None) -> Mount:
    """Return the mount with the container's SELinux label if its file system takes one (mount(8), context)."""
    own = any(option.startswith("context=") for option in mount.options)
    if label is None or own or mount.is_bind or mount.type in _UNLABELLED:
        return mount
    return mount.replace(options=(*mount.options, f'context="{label}"'))


def _mount_root(spec: Spec, tree: int | None) -> Root:
    """Make the root file system a separate mount, with the propagation that the bundle asks for."""
    _detach(spec, private=tree is not None)
    if tree is None:
        syscalls.mount(spec.root, spec.root, None, MS_BIND | MS_REC)
        return Root(spec.root)
    # A user namespace's root may not even see the directory, so the copy is mounted over the host's root.
    target = os.open("/", os.O_PATH | os.O_CLOEXEC)
    syscalls.move_mount(tree, target)
    os.close(target)
    syscalls.mount(None, f"/proc/self/fd/{tree}", None, MS_REC | MS_PRIVATE)
    root = Root(f"/proc/self/fd/{tree}")
    os.close(tree)
    return root


def make_points(spec: Spec, rootfs: str) -> None:
    """Make missing mount points on the root file system itself, as `build` does.

    A restore needs this, because CRIU does not make mount points. Raises StartFailed.
    """
    root = Root(rootfs)
    above = tuple(mount.destination.rstrip("/") + "/" for mount in spec.mounts)
    try:
        for index, mount in enumerate(spec.mounts):
            if mount.destination.startswith(above):
                continue  # it is on another mount, which comes with its contents
            try:
                is_file = mount.is_bind and not os.path.isdir(mount.source)
                os.close(root.make_file(mount.destination) if is_file else root.make_directory(mount.destination))
            except OSError as error:
                raise StartFailed(f"mounts[{index}] ({mount.destination}): {error.strerror or error}") from None
    finally:
        root.close()


def _detach(spec: Spec, *, private: bool) -> None:
    """Keep the container's mounts out of the host, and let the host's in as far as the bundle asks for it.

    `private`: the root file system is a mount that is not shared already.
    """
    propagation = PROPAGATIONS[spec.rootfs_propagation or "rslave"]
    if not propagation & MS_SHARED:
        syscalls.mount(None, "/", None, MS_REC | (MS_SLAVE if propagation & MS_SLAVE else MS_PRIVATE))
        if not propagation & MS_SLAVE:
            return
    if private:
        return
    # A bind mount has the propagation of its source. The root's must be private, or all its mounts reach the host.
    path = os.path.realpath(spec.root)
    while True:
        try:
            syscalls.mount(None, path, None, MS_PRIVATE)
            return
        except OSError as error:
            if error.errno != errno.EINVAL or path == "/":  # EINVAL: not a mount point
                raise
            path = os.path.dirname(path)


def protect(spec: Spec, root: Root) -> None:
    """Apply read-only paths, masked paths, and last a read-only root. Raises StartFailed naming the field."""
    field, null = "", -1
    try:
        for index, path in enumerate(spec.readonly_paths):
            field = f"linux.readonlyPaths[{index}] ({path})"
            if (place := _find(root, path)) >= 0:
                tree = syscalls.open_tree("", dir_fd=place, recursive=True)
                root.stage.change(tree, Change(flags=MS_RDONLY))
                syscalls.move_mount(tree, place)
                os.close(tree)
                os.close(place)
        for index, path in enumerate(spec.masked_paths):
            field = f"linux.maskedPaths[{index}] ({path})"
            if (place := _find(root, path)) < 0:
                continue
            if stat.S_ISDIR(os.fstat(place).st_mode):
                syscalls.mount("tmpfs", f"/proc/self/fd/{place}", "tmpfs", MS_RDONLY, "size=0k")
            else:
                null = null if null >= 0 else _null(root)
                tree = syscalls.open_tree("", dir_fd=null, recursive=False)
                syscalls.move_mount(tree, place)
                os.close(tree)
            os.close(place)
        field = "root.readonly"
        if spec.readonly:
            root.protect()
    except OSError as error:
        raise StartFailed(f"{field}: {error.strerror or error}") from None
    finally:
        root.close()
        if null >= 0:
            os.close(null)


def _find(root: Root, path: str) -> int:
    """Return an O_PATH descriptor of a path to protect, -1 if no process inside can reach it."""
    try:
        return root.find(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return -1


def _null(root: Root) -> int:
    """Return an O_PATH descriptor of the container's null device, checked because it could be an image's link."""
    directory = root.open("/dev")
    try:
        fd = os.open("null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)
    there = os.fstat(fd)
    if not stat.S_ISCHR(there.st_mode) or there.st_rdev != os.makedev(1, 3):
        os.close(fd)
        raise OSError(errno.ENODEV, "/dev/null is not the null device")
    return fd


def pivot(spec: Spec, *, move: bool) -> None:
    """Make the working directory, the container's root, the root directory, and detach the old one.

    `move` is for a host whose root is the initial ramdisk, which pivot_root(2) rejects.
    """
    old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if move:
        from runtime.init import no_pivot  # loaded already: init/container.py

        no_pivot.enter(old)
    else:
        syscalls.pivot_root(".", ".")
        # The old root is now mounted over the new one (pivot_root(2), notes). Its unmount must not reach the host.
        os.fchdir(old)
        syscalls.mount(None, ".", None, MS_REC | MS_SLAVE)
        syscalls.umount(".", syscalls.MNT_DETACH)
    os.close(old)
    os.chdir("/")
    if spec.rootfs_propagation:
        syscalls.mount(None, "/", None, PROPAGATIONS[spec.rootfs_propagation])
