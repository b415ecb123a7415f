"""The root file system of a container while it is being set up: its mounts, devices and links.

Every destination is resolved inside of it (openat2, RESOLVE_IN_ROOT): a symbolic link in an image cannot make us mount
over the host. It is resolved once: from then on a descriptor stands for it (init/stage.py).
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


_MAX_LINKS = 40  # as the kernel counts them: path_resolution(7)


class Root:
    """The root file system while it is being set up; all paths are the container's own."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.stage = Stage(self._fd)
        self._kernel: dict[str, int] = {}  # what is mounted at /proc and /sys: O_PATH descriptors

    def enter(self) -> None:
        """Make it the working directory."""
        os.fchdir(self._fd)

    def close(self) -> None:
        for fd in (self._fd, *self._kernel.values()):
            os.close(fd)

    def protect(self) -> None:
        """Make it read-only."""
        self.stage.protect(self._fd)

    def open(self, path: str, links: int = _MAX_LINKS) -> int:
        """An O_PATH descriptor of `path` inside the root; a symbolic link in it is refused if `links` is 0."""
        return syscalls.open_in_root(self._fd, path.lstrip("/") or ".", os.O_PATH, links=links > 0)

    def find(self, path: str) -> int:
        """The same. In /proc and /sys it is the kernel's file, even if another container has renamed them since."""
        path = plain(path)
        for place, fd in self._kernel.items():
            if path.startswith(place + "/"):
                return syscalls.open_in_root(fd, path[len(place) + 1 :], os.O_PATH)
        return self.open(path)

    def make_directory(self, path: str, links: int = _MAX_LINKS) -> int:
        """An O_PATH descriptor of the directory `path`, which is made, parents included, where it is missing.

        Where a symbolic link leads to nothing, what it names is made, inside the root. `links` may still be followed.
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
        """An O_PATH descriptor of the file `path`, made empty where it is missing; see `make_directory`."""
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
        """Do one entry of `mounts`; `tree` is what `prepare` has made of it. See `build` for the cgroups."""
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
        """An O_PATH descriptor of a mount's destination, which is made where it is missing.

        An image must not put its own files in the place of the kernel's, which others and we ourselves trust: /proc and
        /sys stand where the bundle says, and nothing gets into /proc that `parse_mount` has not seen.
        """
        links = 0 if _is_kernels(mount) else _MAX_LINKS
        make = self.make_directory if is_directory else self.make_file
        try:
            fd = make(mount.destination, links)
        except OSError as error:
            if links or error.errno != errno.ELOOP:
                raise
            message = f"{mount.destination} is a symbolic link in the root file system, or behind one"
            raise OSError(errno.ELOOP, message) from None
        if not f"{mount.place}/".startswith("/proc/") and syscalls.is_procfs(fd):
            os.close(fd)
            raise OSError(errno.EPERM, "leads into a proc file system, which is the kernel's")
        if os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            os.close(fd)
            raise OSError(errno.EINVAL, "leads to the root itself, which it would hide")
        return fd

    def _bind(self, mount: Mount, tree: int | None, options: Options) -> None:
        if tree is None:
            try:
                tree = syscalls.open_tree(mount.source, recursive=mount.recursive)
            except FileNotFoundError:
                raise OSError(errno.ENOENT, f"the source {mount.source} does not exist") from None
        flags, cleared = options.flags & ~(MS_BIND | MS_REC), options.cleared & ~(MS_BIND | MS_REC)
        # What the bundle does not say stays separate from the host: CRIU cannot save mounts that are tied to others.
        propagation = options.propagation or (MS_PRIVATE | MS_REC,)
        # A user without privileges binds /sys as it is at the host, and may write to cgroups of their own in there.
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
            if again:  # of what is in its place already
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
        """/sys/fs/cgroup as the container is to see it: version 2, or each version 1 hierarchy.

        In a cgroup namespace that is a mount of its own; without one, the container's own directories are bound.
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
        """The host's own node in the place of one that a user namespace may not make."""
        if device.type == "p":
            self.make_device(device)
            return
        tree = syscalls.open_tree(device.path, recursive=False)
        try:
            if not _is_node(tree, device):
                raise OSError(
                    errno.ENODEV, "a user namespace can only have the host's devices, and this one is another"
                )  # fmt: skip
            target = self.make_file(device.path)
            try:
                syscalls.move_mount(tree, target)
            finally:
                os.close(target)
        finally:
            os.close(tree)

    def make_device(self, device: Device) -> None:
        """Make a device node; one that is there already with the same numbers is left alone.

        Owner and mode are set by descriptor: who else can write to the directory may have put a link in its place.
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
        """/dev/fd and its kind, where nothing has these names yet."""
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
    """Whether others, and we ourselves, trust what is at the place of a mount."""
    return mount.type in ("proc", "sysfs") or mount.place in ("/proc", "/sys")


def _is_node(fd: int, device: Device) -> bool:
    there = os.fstat(fd)
    return (stat.S_IFMT(there.st_mode), there.st_rdev) == (_KINDS[device.type], os.makedev(device.major, device.minor))


def _behind(parent: str, name: str, parent_fd: int, links: int) -> str:
    """What `name` in the directory `parent` is, as a path inside the root: where a symbolic link leads, or itself.

    It is there, but was not a moment ago: another container can have the same root file system.
    """
    if not links:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode)
    return os.path.join(parent, os.readlink(name, dir_fd=parent_fd) if is_link else name)


def _copy_up(below: int, above: int) -> None:
    """Copy what is in the directory of one O_PATH descriptor into that of another one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    source, target = os.open(f"/proc/self/fd/{below}", flags), os.open(f"/proc/self/fd/{above}", flags)
    try:
        _copy_tree(source, target)
    finally:
        os.close(source)
        os.close(target)


def _copy_tree(source: int, target: int) -> None:
    """Copy what is in a directory into another one, with owners and modes; nothing outside is followed or opened."""
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
