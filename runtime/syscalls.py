"""The only place that touches ctypes: one thin function per system call that Python 3.11 lacks.

Each raises OSError with the errno, and the names of the call and what it was about in its text.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_DETACH = 2

PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
# System call numbers are the same on all architectures from 424 on (pidfd_send_signal and later).
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_SYS_OPENAT2 = 437
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_CAPABILITY_VERSION_3 = 0x20080522


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


@functools.cache
def _function(name: str) -> Callable[..., int]:
    """A libc function that returns an int, -1 for failure."""
    function: Callable[..., int] = getattr(_libc(), name)
    return function


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _bytes(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def _syscall(number: int, what: str, *args: Any) -> int:
    wide = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(_function("syscall")(ctypes.c_long(number), *wide), what)


def unshare(flags: int) -> None:
    """unshare(2)"""
    _check(_function("unshare")(ctypes.c_int(flags)), f"unshare {flags:#x}")


def setns(fd: int, flags: int = 0) -> None:
    """setns(2); `fd` is a namespace's descriptor or a pidfd."""
    _check(_function("setns")(ctypes.c_int(fd), ctypes.c_int(flags)), f"setns {flags:#x}")


def mount(
    source: str | os.PathLike[str] | None,
    target: str | os.PathLike[str],
    fstype: str | None,
    flags: int,
    data: str | None = None,
) -> None:
    """mount(2)"""
    result = _function("mount")(
        _bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)
    )  # fmt: skip
    _check(result, f"mount {fstype or source or ''} on {os.fspath(target)}")


def umount(target: str | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2)"""
    _check(_function("umount2")(_bytes(target), ctypes.c_int(flags)), f"umount {os.fspath(target)}")


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)"""
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _syscall(number, f"pivot_root {new}", ctypes.c_char_p(os.fsencode(new)), ctypes.c_char_p(os.fsencode(old)))


def prctl(option: int, *args: int) -> None:
    """prctl(2)"""
    padded = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    _check(_function("prctl")(ctypes.c_int(option), *padded), f"prctl {option}")


def sethostname(name: str) -> None:
    """sethostname(2)"""
    data = os.fsencode(name)
    _check(_function("sethostname")(data, ctypes.c_size_t(len(data))), f"sethostname {name}")


def setdomainname(name: str) -> None:
    """setdomainname(2)"""
    data = os.fsencode(name)
    _check(_function("setdomainname")(data, ctypes.c_size_t(len(data))), f"setdomainname {name}")


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) for this thread; the arguments are bit masks of capabilities."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = 0xFFFFFFFF, 32
    sets = [effective, permitted, inheritable]
    data = (ctypes.c_uint32 * 6)(*(value & low for value in sets), *(value >> high for value in sets))
    _check(_function("capset")(ctypes.byref(header), ctypes.byref(data)), "capset")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in_root(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2(2) with RESOLVE_IN_ROOT: no symbolic link in `path` leads out of the directory `root_fd`."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return _syscall(
        _SYS_OPENAT2, f"open {path}", root_fd, ctypes.c_char_p(os.fsencode(path)), ctypes.byref(how),
        ctypes.sizeof(how),
    )  # fmt: skip


def detached_tmpfs(*, mode: int) -> int:
    """A directory descriptor of a new tmpfs that is mounted nowhere; it vanishes with its last descriptor."""
    context = _syscall(_SYS_FSOPEN, "fsopen tmpfs", ctypes.c_char_p(b"tmpfs"), _FSOPEN_CLOEXEC)
    try:
        value = ctypes.c_char_p(f"{mode:o}".encode())
        key = ctypes.c_char_p(b"mode")
        _syscall(_SYS_FSCONFIG, "fsconfig tmpfs", context, _FSCONFIG_SET_STRING, key, value, 0)
        _syscall(_SYS_FSCONFIG, "fsconfig tmpfs", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mounted = _syscall(_SYS_FSMOUNT, "fsmount tmpfs", context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mounted)
    finally:
        os.close(mounted)
