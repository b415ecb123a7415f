"""Set up a container's root file system: its mounts, devices and links.

Every destination is resolved inside the root (openat2, RESOLVE_IN_ROOT), so that a symbolic link in an image cannot
lead a mount onto the host. It is resolved once; from then on a descriptor stands for it (init/stage.py).
"""

from __future__ import annotations

import errno
import os
import stat

from runtime.cgroups.hierarchies import UNIFIED, discover
from runtime.init.stage import Change, Stage
from runtime.linux import syscalls
from runtime.linux.mount_flags import ATTR_RDONLY, MS_BIND, MS_PRIVATE, MS_RDONLY, MS_REC, MS_REMOUNT
from runtime.spec.mounts import parse_options, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec.mounts import Device, Mount, Options

_DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
}  # fmt: skip
_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


_MAX_LINKS = 40  # the kernel's limit: path_resolution(7)


class Root:
    """The root file system while it is being set up; all paths are those inside the container."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.stage = Stage(self._fd)
        self._kernel: dict[str, int] = {}  # O_PATH descriptors of the mounts on /proc and /sys

    def enter(self) -> None:
        """Make the root file system the working directory."""
        os.fchdir(self._fd)

    def close(self) -> None:
        for fd in (self._fd, *self._kernel.values()):
            os.close(fd)

    def protect(self) -> None:
        """Make the root file system read-only."""
        self.stage.protect(self._fd)

    def open(self, path: str, links: int = _MAX_LINKS) -> int:
        """Return an O_PATH descriptor of `path` inside the root; fail at a symbolic link if `links` is 0."""
        return syscalls.open_in_root(self._fd, path.lstrip("/") or ".", os.O_PATH, links=links > 0)

    def find(self, path: str) -> int:
        """Return what `open` does, but in /proc and /sys the kernel's file, even if a container renames them."""
        path = plain(path)
        for place, fd in self._kernel.items():
            if path.startswith(place + "/"):
                return syscalls.open_in_root(fd, path[len(place) + 1 :], os.O_PATH)
        return self.open(path)

    def make_directory(self, path: str, links: int = _MAX_LINKS) -> int:
        """Return an O_PATH descriptor of the directory `path`; make it and its parents if they are missing.

        If a symbolic link dangles, make its target, inside the root. Follow at most `links` links.
        """
        missing: list[str] = []
        while True:
            try:
                fd = self.open(path, links)
                break
            except FileNotFoundError:
                path, name = os.path.split(path.rstrip("/"))
                missing.append(name)
        while missing:
            name = missing.pop()
            try:
                os.mkdir(name, 0o755, dir_fd=fd)
            except FileExistsError:
                if links:
                    os.close(self.make_directory(_behind(path, name, fd, links), links - 1))
            finally:
                os.close(fd)
            path = os.path.join(path, name)
            fd = self.open(path, links)
        return fd

    def make_file(self, path: str, links: int = _MAX_LINKS) -> int:
        """Return an O_PATH descriptor of the file `path`; make it, empty, if it is missing. See `make_directory`."""
        try:
            return self.open(path, links)
        except FileNotFoundError:
            parent, name = os.path.split(path)
            parent_fd = self.make_directory(parent)
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent_fd))
            except FileExistsError:
                return self.make_file(_behind(parent, name, parent_fd, links), links - 1)
            finally:
                os.close(parent_fd)
            return self.open(path)

    def mount(self, mount: Mount, tree: int | None, own_cgroups: dict[str, str] | None) -> None:
        """Mount one entry of `mounts`. `tree`: the copy from mounts.prepare; `own_cgroups`: see mounts.build."""
        options = parse_options(mount.options)
        if mount.is_bind:
            self._bind(mount, tree, options)
            return
        target = self._place(mount, is_directory=True)
        try:
            if mount.type == "cgroup":
                self._mount_cgroups(target, options.flags, own_cgroups)
            else:
                self._mount_new(target, mount, options)
        finally:
            os.close(target)

    def _place(self, mount: Mount, *, is_directory: bool) -> int:
        """Return an O_PATH descriptor of a mount's destination; make it if it is missing.

        An image must not replace the kernel's files, which the runtime and other programs trust: /proc and /sys are
        mounted exactly where the bundle says, and nothing is mounted in /proc that `parse_mount` has not checked.
        """
        links = 0 if _is_kernels(mount) else _MAX_LINKS
        make = self.make_directory if is_directory else self.make_file
        try:
            fd = make(mount.destination, links)
        except OSError as error:
            if links or error.errno != errno.ELOOP:
                raise
            message = f"{mount.destination} is a symbolic link in the root file system, or leads through one"
            raise OSError(errno.ELOOP, message) from None
        if not f"{mount.place}/".startswith("/proc/") and syscalls.is_procfs(fd):
            os.close(fd)
            raise OSError(errno.EPERM, "leads into a proc file system, where nothing may be mounted")
        if os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            os.close(fd)
            raise OSError(errno.EINVAL, "leads to the root itself, which the mount would hide")
        return fd

    def _bind(self, mount: Mount, tree: int | None, options: Options) -> None:
        if tree is None:
            try:
                tree = syscalls.open_tree(mount.source, recursive=mount.recursive)
            except FileNotFoundError:
                raise OSError(errno.ENOENT, f"the source {mount.source} does not exist") from None
        flags, cleared = options.flags & ~(MS_BIND | MS_REC), options.cleared & ~(MS_BIND | MS_REC)
        # Private by default, because CRIU cannot dump mounts that propagate to or from the host.
        propagation = options.propagation or (MS_PRIVATE | MS_REC,)
        # An unprivileged user binds the host's /sys, which has cgroups that the user may write to: "ro" covers them.
        whole = ATTR_RDONLY if mount.recursive and flags & MS_RDONLY and _is_kernels(mount) else 0
        try:
            target = self._place(mount, is_directory=stat.S_ISDIR(os.fstat(tree).st_mode))
            try:
                change = Change(flags, cleared, options.set | whole, options.clear, propagation)
                self.stage.change(tree, change, single=not mount.recursive)
                syscalls.move_mount(tree, target)
                self._keep(mount, tree)
            finally:
                os.close(target)
        finally:
            os.close(tree)

    def _keep(self, mount: Mount, mounted: int) -> None:
        if _is_kernels(mount):
            before = self._kernel.get(mount.place)
            self._kernel[mount.place] = os.dup(mounted)
            if before is not None:
                os.close(before)

    def _mount_new(self, target: int, mount: Mount, options: Options) -> None:
        change = Change(set=options.set, clear=options.clear, propagation=options.propagation)
        if options.copy_up:
            change = change.replace(flags=options.flags & MS_RDONLY)
        source, flags = mount.source or mount.type, options.flags & ~change.flags
        again = bool(options.flags & MS_REMOUNT)
        if again or not (options.copy_up or change != Change() or _is_kernels(mount)):
            syscalls.mount(source, f"/proc/self/fd/{target}", mount.type, flags, options.data or None)
            if again:  # changes the mount that is in its place already
                self.stage.change(target, change, staged=True, single=True)
            return
        made = self.stage.new(source, mount.type, flags, options.data or None)
        try:
            if options.copy_up:
                _copy_up(target, made)
            self.stage.change(made, change, staged=True, single=True)
            syscalls.move_mount(made, target)
            self._keep(mount, made)
        finally:
            os.close(made)

    def _mount_cgroups(self, target: int, flags: int, own: dict[str, str] | None) -> None:
        """Mount what the container sees at /sys/fs/cgroup: version 2, or each version 1 hierarchy.

        In a cgroup namespace these are new mounts; without one the container's own directories are bound.
        """
        hierarchies = discover()
        if [hierarchy.controllers for hierarchy in hierarchies] == [(UNIFIED,)]:
            self._mount_hierarchy(target, "cgroup2", "", flags, own.get(UNIFIED) if own else None)
            return
        top = self.stage.new("tmpfs", "tmpfs", flags & ~MS_RDONLY, "mode=755")
        try:
            for hierarchy in hierarchies:
                if hierarchy.controllers == (UNIFIED,):
                    continue
                names = ",".join(hierarchy.controllers)
                name = os.path.basename(hierarchy.mountpoint)
                options = names if not names.startswith("name=") else f"none,{names}"
                os.mkdir(name, 0o755, dir_fd=top)
                place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
                try:
                    ours = own.get(hierarchy.controllers[0]) if own else None
                    self._mount_hierarchy(place, "cgroup", options, flags, ours)
                finally:
                    os.close(place)
                for controller in hierarchy.controllers:
                    if controller != name and "=" not in controller:  # cpu -> cpu,cpuacct
                        os.symlink(name, controller, dir_fd=top)
            self.stage.change(top, Change(flags=flags & MS_RDONLY), staged=True)
            syscalls.move_mount(top, target)
        finally:
            os.close(top)

    def _mount_hierarchy(self, target: int, kind: str, options: str, flags: int, own: str | None) -> None:
        if own is None:
            syscalls.mount("cgroup", f"/proc/self/fd/{target}", kind, flags, options)
            return
        tree = syscalls.open_tree(own, recursive=False)
        try:
            self.stage.change(tree, Change(flags=flags))
            syscalls.move_mount(tree, target)
        finally:
            os.close(tree)

    def bind_device(self, device: Device) -> None:
        """Bind the host's device node, because a user namespace may not make one."""
        if device.type == "p":
            self.make_device(device)
            return
        tree = syscalls.open_tree(device.path, recursive=False)
        try:
            if not _is_node(tree, device):
                raise OSError(
                    errno.ENODEV, "in a user namespace it must be the host's device of this path, and it differs"
                )  # fmt: skip
            target = self.make_file(device.path)
            try:
                syscalls.move_mount(tree, target)
            finally:
                os.close(target)
        finally:
            os.close(tree)

    def make_device(self, device: Device) -> None:
        """Make a device node; leave an existing one with the same numbers alone.

        Set owner and mode by descriptor, because another writer of the directory may have put a link in its place.
        """
        parent, name = os.path.split(device.path)
        parent_fd = self.make_directory(parent)
        try:
            exists = None
            try:
                number = os.makedev(device.major, device.minor)
                os.mknod(name, _KINDS[device.type] | device.mode, number, dir_fd=parent_fd)
            except FileExistsError as error:
                exists = error
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        finally:
            os.close(parent_fd)
        try:
            if not _is_node(fd, device):
                raise exists or FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            if exists is None:
                os.chown(f"/proc/self/fd/{fd}", device.uid, device.gid)
                os.chmod(f"/proc/self/fd/{fd}", device.mode)
        finally:
            os.close(fd)

    def make_links(self) -> None:
        """Make /dev/fd and similar links, unless their names are taken."""
        for path, target in _DEVICE_LINKS.items():
            parent, name = os.path.split(path)
            parent_fd = self.make_directory(parent)
            try:
                os.symlink(target, name, dir_fd=parent_fd)
            except FileExistsError:
                pass
            finally:
                os.close(parent_fd)


def _is_kernels(mount: Mount) -> bool:
    """Return whether a mount holds files of the kernel that the runtime and other programs trust."""
    return mount.type in ("proc", "sysfs") or mount.place in ("/proc", "/sys")


def _is_node(fd: int, device: Device) -> bool:
    there = os.fstat(fd)
    return (stat.S_IFMT(there.st_mode), there.st_rdev) == (_KINDS[device.type], os.makedev(device.major, device.minor))


def _behind(parent: str, name: str, parent_fd: int, links: int) -> str:
    """Return `name` in the directory `parent` as a path inside the root, or where it leads if it is a symbolic link.

    It exists now but did not a moment ago, because another container can have the same root file system.
    """
    if not links:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode)
    return os.path.join(parent, os.readlink(name, dir_fd=parent_fd) if is_link else name)


def _copy_up(below: int, above: int) -> None:
    """Copy the contents of one directory into another; both are O_PATH descriptors."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    source, target = os.open(f"/proc/self/fd/{below}", flags), os.open(f"/proc/self/fd/{above}", flags)
    try:
        _copy_tree(source, target)
    finally:
        os.close(source)
        os.close(target)


def _copy_tree(source: int, target: int) -> None:
    """Copy a directory's contents into another one, with owners and modes; follow no link and open no device."""
    for name in os.listdir(source):
        there = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(there.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISDIR(there.st_mode):
            os.mkdir(name, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner, outer = os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=target)
            _copy_tree(inner, outer)
            os.close(inner)
            os.close(outer)
        elif stat.S_ISREG(there.st_mode):
            inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
            outer = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, dir_fd=target)
            while os.sendfile(outer, inner, None, 1 << 24):
                pass
            os.close(inner)
            os.close(outer)
        else:
            os.mknod(name, there.st_mode, there.st_rdev, dir_fd=target)
        os.chown(name, there.st_uid, there.st_gid, dir_fd=target, follow_symlinks=False)
        if not stat.S_ISLNK(there.st_mode):
            os.chmod(name, stat.S_IMODE(there.st_mode), dir_fd=target)
