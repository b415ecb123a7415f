"""The root file system of a container while it is being set up: its mounts, devices and links.

Every destination is resolved inside of it (openat2, RESOLVE_IN_ROOT): a symbolic link in an image cannot make us mount
over the host.
"""

from __future__ import annotations

import errno
import os
import stat

from runtime import syscalls
from runtime.cgroups.hierarchies import UNIFIED, discover
from runtime.mount_spec import (
    MS_BIND,
    MS_NOATIME,
    MS_NOSYMFOLLOW,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_RELATIME,
    MS_REMOUNT,
    parse_options,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.mount_spec import Device, Mount

_DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
}  # fmt: skip
_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


# What statvfs(3) says of a mount -> the flag of mount(2)
_KEPT = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: MS_RELATIME, 8192: MS_NOSYMFOLLOW}
_MAX_LINKS = 40  # as the kernel counts them: path_resolution(7)


class Root:
    """The root file system while it is being set up; all paths are the container's own."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Make it the working directory."""
        os.fchdir(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def open(self, path: str) -> int:
        """An O_PATH descriptor of `path` inside the root."""
        return syscalls.open_in_root(self._fd, path.lstrip("/") or ".", os.O_PATH)

    def make_directory(self, path: str, links: int = _MAX_LINKS) -> int:
        """An O_PATH descriptor of the directory `path`, which is made, parents included, where it is missing.

        Where a symbolic link leads to nothing, what it names is made, inside the root. `links` may still be followed.
        """
        missing: list[str] = []
        while True:
            try:
                fd = self.open(path)
                break
            except FileNotFoundError:
                path, name = os.path.split(path.rstrip("/"))
                missing.append(name)
        while missing:
            name = missing.pop()
            try:
                os.mkdir(name, 0o755, dir_fd=fd)
            except FileExistsError:
                os.close(self.make_directory(_behind(path, name, fd, links), links - 1))
            finally:
                os.close(fd)
            path = os.path.join(path, name)
            fd = self.open(path)
        return fd

    def make_file(self, path: str, links: int = _MAX_LINKS) -> int:
        """An O_PATH descriptor of the file `path`, made empty where it is missing; see `make_directory`."""
        try:
            return self.open(path)
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
        if mount.type == "cgroup":
            self._mount_cgroups(mount, own_cgroups)
            return
        options = parse_options(mount.options)
        if mount.is_bind:
            self._bind(mount, tree, options.flags)
            rest, cleared = options.flags & ~(MS_BIND | MS_REC), options.cleared & ~(MS_BIND | MS_REC)
            if rest or cleared:
                self._remount(mount.destination, rest, cleared)
        else:
            if mount.type in ("proc", "sysfs"):
                self._refuse_links(mount.destination)
            below = fd = self.make_directory(mount.destination)
            if options.copy_up:
                below = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            late = options.flags & MS_RDONLY if options.copy_up else 0
            self._attach(fd, mount.source or mount.type, mount.type, options.flags & ~late, options.data)
            if options.copy_up:
                self._copy_up(below, mount.destination)
                if late:
                    self._remount(mount.destination, options.flags, 0)
        # What the bundle does not say stays separate from the host: CRIU cannot save mounts that are tied to others.
        for change in options.propagation or ((MS_PRIVATE | MS_REC,) if mount.is_bind else ()):
            self._again(mount.destination, change)
        if options.set or options.clear:
            with_all = self.open(mount.destination)
            try:
                syscalls.mount_setattr(with_all, set=options.set, clear=options.clear, recursive=True)
            finally:
                os.close(with_all)

    def _bind(self, mount: Mount, tree: int | None, flags: int) -> None:
        if tree is None and not os.path.exists(mount.source):
            raise OSError(errno.ENOENT, f"the source {mount.source} does not exist")
        is_directory = stat.S_ISDIR((os.stat(mount.source) if tree is None else os.fstat(tree)).st_mode)
        fd = self.make_directory(mount.destination) if is_directory else self.make_file(mount.destination)
        if tree is None:
            self._attach(fd, mount.source, None, MS_BIND | flags & MS_REC, None)
            return
        try:
            syscalls.move_mount(tree, fd)
        finally:
            os.close(fd)
            os.close(tree)

    def _remount(self, path: str, flags: int, cleared: int) -> None:
        fd = self.open(path)
        try:
            remount(f"/proc/self/fd/{fd}", flags, cleared)
        finally:
            os.close(fd)

    def _refuse_links(self, path: str) -> None:
        """proc and sysfs stand where the image says, or an image could put its own files in their place."""
        current = ""
        for part in filter(None, path.split("/")):
            current = os.path.join(current, part)
            try:
                fd = syscalls.open_in_root(self._fd, current, os.O_PATH | os.O_NOFOLLOW)
            except FileNotFoundError:
                return
            is_link = stat.S_ISLNK(os.fstat(fd).st_mode)
            os.close(fd)
            if is_link:
                raise OSError(errno.ELOOP, f"/{current} is a symbolic link in the root file system")

    def _copy_up(self, below: int, path: str) -> None:
        fd = self.open(path)
        try:
            above = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _copy_tree(below, above)
            os.close(above)
        finally:
            os.close(fd)
            os.close(below)

    def _attach(self, fd: int, source: str, fstype: str | None, flags: int, data: str | None) -> None:
        """Mount on the directory or file behind an O_PATH descriptor, which is closed."""
        try:
            syscalls.mount(source, f"/proc/self/fd/{fd}", fstype, flags, data or None)
        finally:
            os.close(fd)

    def _again(self, path: str, flags: int) -> None:
        """Change what is mounted at `path`."""
        fd = self.open(path)
        try:
            syscalls.mount(None, f"/proc/self/fd/{fd}", None, flags)
        finally:
            os.close(fd)

    def _mount_cgroups(self, mount: Mount, own: dict[str, str] | None) -> None:
        """/sys/fs/cgroup as the container is to see it: version 2, or each version 1 hierarchy.

        In a cgroup namespace that is a mount of its own; without one, the container's own directories are bound.
        """
        flags = parse_options(mount.options).flags
        hierarchies = discover()
        place = mount.destination
        if [hierarchy.controllers for hierarchy in hierarchies] == [(UNIFIED,)]:
            self._mount_hierarchy(place, "cgroup2", "", flags, own.get(UNIFIED) if own else None)
            return
        self._attach(self.make_directory(place), "tmpfs", "tmpfs", flags & ~MS_RDONLY, "mode=755")
        for hierarchy in hierarchies:
            if hierarchy.controllers == (UNIFIED,):
                continue
            names = ",".join(hierarchy.controllers)
            name = os.path.basename(hierarchy.mountpoint)
            options = names if not names.startswith("name=") else f"none,{names}"
            below = f"{place}/{name}"
            self._mount_hierarchy(below, "cgroup", options, flags, own.get(hierarchy.controllers[0]) if own else None)
            parent = self.open(place)
            for controller in hierarchy.controllers:
                if controller != name and "=" not in controller:  # cpu -> cpu,cpuacct
                    os.symlink(name, controller, dir_fd=parent)
            os.close(parent)
        if flags & MS_RDONLY:
            self._remount(place, flags, 0)

    def _mount_hierarchy(self, place: str, kind: str, options: str, flags: int, own: str | None) -> None:
        fd = self.make_directory(place)
        if own is None:
            self._attach(fd, "cgroup", kind, flags, options)
        else:
            self._attach(fd, own, None, MS_BIND, None)
            self._remount(place, flags, 0)

    def bind_device(self, device: Device) -> None:
        """The host's own node in the place of one that a user namespace may not make."""
        if device.type == "p":
            self.make_device(device)
            return
        there = os.stat(device.path)
        if (stat.S_IFMT(there.st_mode), there.st_rdev) != (_KINDS[device.type], os.makedev(device.major, device.minor)):
            raise OSError(errno.ENODEV, "a user namespace can only have the host's devices, and this one is another")
        self._attach(self.make_file(device.path), device.path, None, MS_BIND, None)

    def make_device(self, device: Device) -> None:
        """Make a device node; one that is there already with the same numbers is left alone."""
        parent, name = os.path.split(device.path)
        parent_fd = self.make_directory(parent)
        try:
            number = os.makedev(device.major, device.minor)
            try:
                os.mknod(name, _KINDS[device.type] | device.mode, number, dir_fd=parent_fd)
            except FileExistsError:
                there = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
                if there.st_rdev == number and stat.S_IFMT(there.st_mode) == _KINDS[device.type]:
                    return
                raise
            os.chown(name, device.uid, device.gid, dir_fd=parent_fd, follow_symlinks=False)
            os.chmod(name, device.mode, dir_fd=parent_fd)
        finally:
            os.close(parent_fd)

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


def _behind(parent: str, name: str, parent_fd: int, links: int) -> str:
    """What `name` in the directory `parent` is, as a path inside the root: where a symbolic link leads, or itself.

    It is there, but was not a moment ago: another container can have the same root file system.
    """
    if not links:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode)
    return os.path.join(parent, os.readlink(name, dir_fd=parent_fd) if is_link else name)


def remount(path: str, flags: int, cleared: int) -> None:
    """Change flags of the one mount at `path`; others stay, which a user namespace demands of those it inherited."""
    there = os.statvfs(path).f_flag
    kept = sum(flag for bit, flag in _KEPT.items() if there & bit) & ~cleared
    if cleared & MS_NOATIME:
        kept |= MS_RELATIME  # without any of these flags the kernel leaves them as they are
    syscalls.mount(None, path, None, MS_REMOUNT | MS_BIND | flags | kept)


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
