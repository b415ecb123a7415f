"""The container's file system tree: mounts, devices, pivot_root, masked and read-only paths.

Every destination is resolved inside the root file system (openat2, RESOLVE_IN_ROOT): a symbolic link in it cannot
make us mount over the host. Everything is private to the container's mount namespace, and nothing of the host stays
visible, which CRIU needs to be able to dump it.
"""

import errno
import os
import stat
from pathlib import Path

from runtime import syscalls
from runtime.cgroups.hierarchies import UNIFIED, discover
from runtime.errors import StartFailed
from runtime.spec import Device, Mount, Spec
from runtime.syscalls import (
    MS_BIND,
    MS_DIRSYNC,
    MS_I_VERSION,
    MS_LAZYTIME,
    MS_MANDLOCK,
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_RELATIME,
    MS_REMOUNT,
    MS_SHARED,
    MS_SILENT,
    MS_SLAVE,
    MS_STRICTATIME,
    MS_SYNCHRONOUS,
    MS_UNBINDABLE,
)  # fmt: skip

# Option -> (flag, is the flag cleared)
_FLAGS: dict[str, tuple[int, bool]] = {
    "defaults": (0, False), "ro": (MS_RDONLY, False), "rw": (MS_RDONLY, True), "nosuid": (MS_NOSUID, False),
    "suid": (MS_NOSUID, True), "nodev": (MS_NODEV, False), "dev": (MS_NODEV, True), "noexec": (MS_NOEXEC, False),
    "exec": (MS_NOEXEC, True), "sync": (MS_SYNCHRONOUS, False), "async": (MS_SYNCHRONOUS, True),
    "dirsync": (MS_DIRSYNC, False), "mand": (MS_MANDLOCK, False), "nomand": (MS_MANDLOCK, True),
    "noatime": (MS_NOATIME, False), "atime": (MS_NOATIME, True), "nodiratime": (MS_NODIRATIME, False),
    "diratime": (MS_NODIRATIME, True), "relatime": (MS_RELATIME, False), "norelatime": (MS_RELATIME, True),
    "strictatime": (MS_STRICTATIME, False), "nostrictatime": (MS_STRICTATIME, True), "silent": (MS_SILENT, False),
    "loud": (MS_SILENT, True), "iversion": (MS_I_VERSION, False), "noiversion": (MS_I_VERSION, True),
    "lazytime": (MS_LAZYTIME, False), "nolazytime": (MS_LAZYTIME, True), "nosymfollow": (MS_NOSYMFOLLOW, False),
    "symfollow": (MS_NOSYMFOLLOW, True), "bind": (MS_BIND, False), "rbind": (MS_BIND | MS_REC, False),
}  # fmt: skip
_PROPAGATION = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC, "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC, "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip

_DEFAULT_DEVICES = tuple(
    Device(path, "c", major, minor, 0o666, 0, 0)
    for path, major, minor in (
        ("/dev/null", 1, 3), ("/dev/zero", 1, 5), ("/dev/full", 1, 7), ("/dev/random", 1, 8), ("/dev/urandom", 1, 9),
        ("/dev/tty", 5, 0),
    )
)  # fmt: skip
_DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
}  # fmt: skip
_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def parse_options(options: tuple[str, ...]) -> tuple[int, list[int], str]:
    """Mount options as flags, propagation changes to make afterwards, and the rest as data for the file system."""
    flags, propagation, data = 0, [], []
    for option in options:
        if option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        elif option in _FLAGS:
            flag, clear = _FLAGS[option]
            flags = flags & ~flag if clear else flags | flag
        else:
            data.append(option)
    return flags, propagation, ",".join(data)


class Root:
    """The root file system while it is being set up; all paths are the container's own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def open(self, path: str) -> int:
        """An O_PATH descriptor of `path` inside the root."""
        return syscalls.open_in_root(self._fd, path.lstrip("/") or ".", os.O_PATH)

    def make_directory(self, path: str) -> int:
        """An O_PATH descriptor of the directory `path`, which is made, parents included, where it is missing."""
        current = "."
        for part in Path(path.lstrip("/")).parts:
            parent, current = current, os.path.join(current, part)
            try:
                os.close(self.open(current))
            except FileNotFoundError:
                parent_fd = self.open(parent)
                try:
                    os.mkdir(part, 0o755, dir_fd=parent_fd)
                except FileExistsError:
                    pass  # a dangling symbolic link; opening it below says so
                finally:
                    os.close(parent_fd)
        return self.open(current)

    def make_file(self, path: str) -> int:
        """An O_PATH descriptor of the file `path`, made empty where it is missing."""
        try:
            return self.open(path)
        except FileNotFoundError:
            parent, name = os.path.split(path)
            parent_fd = self.make_directory(parent)
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent_fd))
            finally:
                os.close(parent_fd)
            return self.open(path)

    def mount(self, mount: Mount) -> None:
        """Do one entry of `mounts`."""
        if mount.type == "cgroup":
            self._mount_cgroups(mount)
            return
        flags, propagation, data = parse_options(mount.options)
        if mount.is_bind:
            source = os.path.realpath(mount.source)
            if not os.path.exists(source):
                raise OSError(errno.ENOENT, f"the source {mount.source} does not exist")
            fd = self.make_directory(mount.destination) if os.path.isdir(source) else self.make_file(mount.destination)
            self._attach(fd, source, None, MS_BIND | flags & MS_REC, None)
            rest = flags & ~(MS_BIND | MS_REC)
            if rest:
                self._again(mount.destination, MS_REMOUNT | MS_BIND | rest)
        else:
            fd = self.make_directory(mount.destination)
            self._attach(fd, mount.source or mount.type, mount.type, flags, data)
        for change in propagation:
            self._again(mount.destination, change)

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

    def _mount_cgroups(self, mount: Mount) -> None:
        """/sys/fs/cgroup as the container's own cgroup namespace shows it: version 2, or each version 1 hierarchy."""
        flags, _, _ = parse_options(mount.options)
        hierarchies = discover()
        if [hierarchy.controllers for hierarchy in hierarchies] == [(UNIFIED,)]:
            self._attach(self.make_directory(mount.destination), "cgroup", "cgroup2", flags, None)
            return
        plain = flags & ~MS_RDONLY
        self._attach(self.make_directory(mount.destination), "tmpfs", "tmpfs", plain, "mode=755")
        for hierarchy in hierarchies:
            if hierarchy.controllers != (UNIFIED,):
                names = ",".join(hierarchy.controllers)
                place = f"{mount.destination}/{hierarchy.mountpoint.name}"
                options = names if not names.startswith("name=") else f"none,{names}"
                self._attach(self.make_directory(place), "cgroup", "cgroup", flags, options)
        if flags & MS_RDONLY:
            self._again(mount.destination, MS_REMOUNT | MS_BIND | flags)

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


def build(spec: Spec) -> None:
    """Set up all mounts and devices below the root file system, in a mount namespace that is already our own."""
    propagation = _PROPAGATION.get(spec.rootfs_propagation or "rprivate", MS_PRIVATE | MS_REC)
    syscalls.mount(None, "/", None, MS_REC | (MS_SLAVE if propagation & (MS_SLAVE | MS_SHARED) else MS_PRIVATE))
    syscalls.mount(spec.root, spec.root, None, MS_BIND | MS_REC)
    root = Root(spec.root)
    try:
        for index, mount in enumerate(spec.mounts):
            try:
                root.mount(mount)
            except OSError as error:
                raise StartFailed(f"mounts[{index}] ({mount.destination}): {error.strerror or error}") from None
        for device in (*_DEFAULT_DEVICES, *spec.devices):
            try:
                root.make_device(device)
            except OSError as error:
                raise StartFailed(f"linux.devices ({device.path}): {error.strerror or error}") from None
        root.make_links()
    finally:
        root.close()


def pivot(spec: Spec) -> None:
    """Make the container's root the root; the old one is gone afterwards."""
    os.chdir(spec.root)
    syscalls.pivot_root(".", ".")
    # The old root now lies over the new one: its propagation is cut, then it is taken away (pivot_root(2), notes).
    syscalls.mount(None, ".", None, MS_REC | MS_SLAVE)
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def protect(spec: Spec) -> None:
    """After pivot: read-only paths, masked paths, and a read-only root."""
    for path in spec.readonly_paths:
        if os.path.lexists(path):
            syscalls.mount(path, path, None, MS_BIND | MS_REC)
            keep = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
            syscalls.mount(None, path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_REC | keep)
    for path in spec.masked_paths:
        if os.path.isdir(path):
            syscalls.mount("tmpfs", path, "tmpfs", MS_RDONLY, "size=0k")
        elif os.path.lexists(path):
            syscalls.mount("/dev/null", path, None, MS_BIND)
    if spec.readonly:
        keep = os.statvfs("/").f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        syscalls.mount(None, "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | keep)
