"""Wrap system calls that Python 3.11 lacks: one thin function each.

Each raises OSError with the errno; its text names the call and its argument.
"""

from __future__ import annotations

import errno
import os
import sys

from runtime.light import ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MNT_DETACH = 2

FAN_CLOSE_WRITE, FAN_MARK_FILESYSTEM, FAN_REPORT_FID = 0x8, 0x100, 0x200

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_AT_SYMLINK_NOFOLLOW, _STATX_BTIME = 0x100, 0x800
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_MARK_ADD = 1, 2, 1
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
_KEYCTL_JOIN_SESSION_KEYRING = 1
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_SHIFT = 1, 13
_KCMP_SYSVSEM = 6
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE_IN_ROOT = 0x10
_OPEN_ATTEMPTS = 1000
# System call numbers are the same on all architectures from 424 on (pidfd_send_signal and later).
_SYS_LANDLOCK_CREATE_RULESET, _LANDLOCK_VERSION = 444, 1
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 429, 430, 431, 432
_SYS_CLONE3, _SYS_OPENAT2 = 435, 437
_CLONE_INTO_CGROUP, _SIGCHLD = 0x2_0000_0000, 17
_SYS_MOUNT_SETATTR = 442
_VARYING = (
    "pivot_root", "keyctl", "ioprio_set", "ioprio_get", "kcmp", "sched_setattr", "sched_getattr", "seccomp", "bpf",
)  # fmt: skip
_SYS = {
    "x86_64": (155, 250, 251, 252, 312, 314, 315, 317, 321),
    "aarch64": (41, 219, 30, 31, 272, 274, 275, 277, 280),
    "riscv64": (41, 219, 30, 31, 272, 274, 275, 277, 280),
    "ppc64le": (203, 271, 273, 274, 354, 355, 356, 358, 361),
    "s390x": (217, 280, 282, 283, 343, 345, 346, 348, 351),
}
IN_MOVED_TO, IN_DELETE = 0x80, 0x200
_SOL_SOCKET, _SO_GET_FILTER = 1, 26
_PROC_SUPER_MAGIC = 0x9FA0
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_CAPABILITY_VERSION_3 = 0x20080522


_functions: dict[str, Callable[..., int]] = {}


def _function(name: str) -> Callable[..., int]:
    """Return a libc function that returns an int, -1 for failure; bind it at its first use."""
    if name not in _functions:
        function = ctypes.libc(name)
        if name == "syscall":
            function.restype = ctypes.c_long
        _functions[name] = function
    return _functions[name]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _bytes(path: str | bytes | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def _syscall(number: int, what: str, *args: Any) -> int:
    wide = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(_function("syscall")(ctypes.c_long(number), *wide), what)


def _number(name: str) -> int:
    """Return the number of a system call whose number differs between architectures."""
    return _SYS[os.uname().machine][_VARYING.index(name)]


def fork_into(cgroup_fd: int) -> int:
    """clone3(2) as fork(2), with the child created in a version 2 cgroup; for a process with one thread.

    Moving a process into a cgroup waits for an RCU grace period (cgroup_attach_lock); creating one there does not.
    """
    arguments = (ctypes.c_uint64 * 11)()  # struct clone_args: flags, ..., exit_signal (5th), ..., cgroup (11th)
    arguments[0], arguments[4], arguments[10] = _CLONE_INTO_CGROUP, _SIGCHLD, cgroup_fd
    return _syscall(_SYS_CLONE3, "clone3", ctypes.byref(arguments), ctypes.sizeof(arguments))


def unshare(flags: int) -> None:
    """unshare(2)"""
    _check(_function("unshare")(ctypes.c_int(flags)), f"unshare {flags:#x}")


def setns(fd: int, flags: int = 0) -> None:
    """setns(2); `fd` is a namespace's descriptor or a pidfd."""
    _check(_function("setns")(ctypes.c_int(fd), ctypes.c_int(flags)), f"setns {flags:#x}")


def mount(
    source: str | os.PathLike[str] | None,
    target: str | bytes | os.PathLike[str],
    fstype: str | None,
    flags: int,
    data: str | None = None,
) -> None:
    """mount(2)"""
    result = _function("mount")(
        _bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), _bytes(data)
    )  # fmt: skip
    _check(result, f"mount {fstype or source or ''} on {os.fsdecode(target)}")


def umount(target: str | bytes | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2)"""
    _check(_function("umount2")(_bytes(target), ctypes.c_int(flags)), f"umount {os.fsdecode(target)}")


def birth_time(path: str | os.PathLike[str]) -> int:
    """statx(2): return a file's birth time in nanoseconds, of a link itself; 0 if the file system does not store it."""
    buffer = (ctypes.c_char * 256)()
    arguments = (ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path)), ctypes.c_int(_AT_SYMLINK_NOFOLLOW))
    _check(_function("statx")(*arguments, ctypes.c_int(_STATX_BTIME), buffer), f"statx {os.fspath(path)}")
    if not int.from_bytes(buffer.raw[0:4], sys.byteorder) & _STATX_BTIME:
        return 0
    seconds, rest = buffer.raw[80:88], buffer.raw[88:92]
    return int.from_bytes(seconds, sys.byteorder, signed=True) * 1_000_000_000 + int.from_bytes(rest, sys.byteorder)


def is_procfs(fd: int) -> bool:
    """fstatfs(2): return whether a descriptor's file is in a proc file system."""
    buffer = (ctypes.c_char * 256)()  # struct statfs; f_type is its first field
    _check(_function("fstatfs")(ctypes.c_int(fd), buffer), "fstatfs")
    return int.from_bytes(buffer.raw[0:4], sys.byteorder) == _PROC_SUPER_MAGIC


def syncfs(fd: int) -> None:
    """syncfs(2): write the file system of `fd` to disk, and wait for it."""
    _check(_function("syncfs")(ctypes.c_int(fd)), "syncfs")


def fallocate(fd: int, offset: int, length: int) -> None:
    """fallocate(2): allocate disk space for a range of a file without changing its size."""
    sizes = ctypes.c_long(offset), ctypes.c_long(length)
    _check(_function("fallocate")(ctypes.c_int(fd), ctypes.c_int(_FALLOC_FL_KEEP_SIZE), *sizes), "fallocate")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2): free what a range of a file takes, without changing the file's size."""
    sizes = ctypes.c_long(offset), ctypes.c_long(length)
    mode = ctypes.c_int(_FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE)
    _check(_function("fallocate")(ctypes.c_int(fd), mode, *sizes), "fallocate")


def fanotify_init(flags: int, event_flags: int) -> int:
    """fanotify_init(2): return a non-blocking descriptor for notifications."""
    arguments = (ctypes.c_int(flags | _FAN_CLOEXEC | _FAN_NONBLOCK), ctypes.c_int(event_flags))
    return _check(_function("fanotify_init")(*arguments), "fanotify_init")


def fanotify_mark(fd: int, flags: int, mask: int, path: str | os.PathLike[str]) -> None:
    """fanotify_mark(2): watch `path` for the events in `mask`; `flags` give the kind and scope of the mark."""
    arguments = (ctypes.c_int(fd), ctypes.c_int(flags | _FAN_MARK_ADD), ctypes.c_uint64(mask), ctypes.c_int(_AT_FDCWD))
    _check(_function("fanotify_mark")(*arguments, _bytes(path)), f"fanotify_mark {os.fspath(path)}")


def inotify(path: str | os.PathLike[str], mask: int) -> int:
    """inotify(7): return a non-blocking descriptor that is readable once an event of `mask` has happened at `path`."""
    fd = _check(_function("inotify_init1")(ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK)), "inotify_init1")
    try:
        watched = _function("inotify_add_watch")(ctypes.c_int(fd), _bytes(path), ctypes.c_uint32(mask))
        _check(watched, f"inotify_add_watch {os.fspath(path)}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)"""
    paths = [ctypes.c_char_p(os.fsencode(path)) for path in (new, old)]
    _syscall(_number("pivot_root"), f"pivot_root {new}", *paths)


def prctl(option: int, *args: int) -> None:
    """prctl(2)"""
    padded = [ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]
    _check(_function("prctl")(ctypes.c_int(option), *padded), f"prctl {option}")


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    """ptrace(2)"""
    _check(_function("ptrace")(*map(ctypes.c_long, (request, pid, address, data))), f"ptrace {request}")


def ptrace_event_message(pid: int) -> int:
    """ptrace(2) PTRACE_GETEVENTMSG"""
    message = (ctypes.c_ulong * 1)()
    arguments = (*map(ctypes.c_long, (_PTRACE_GETEVENTMSG, pid, 0)), ctypes.byref(message))
    _check(_function("ptrace")(*arguments), "ptrace")
    return int(message[0])


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


def capget() -> tuple[int, int, int]:
    """capget(2): return this thread's effective, permitted and inheritable capabilities, as capset takes them."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    _check(_function("capget")(ctypes.byref(header), ctypes.byref(data)), "capget")
    return data[0] | data[3] << 32, data[1] | data[4] << 32, data[2] | data[5] << 32


def open_in_root(root_fd: int, path: str, flags: int, *, links: bool = True) -> int:
    """openat2(2) with RESOLVE_IN_ROOT: no symbolic link in `path` leads out of the directory `root_fd`.

    Without `links` a symbolic link anywhere in `path` fails with ELOOP.
    """
    return _openat2(root_fd, path, flags, _RESOLVE_IN_ROOT | (0 if links else _RESOLVE_NO_SYMLINKS))


def open_below(directory_fd: int, path: str, flags: int) -> int:
    """openat2(2) below `directory_fd`, without leaving its mount (EXDEV)."""
    return _openat2(directory_fd, path, flags, _RESOLVE_BENEATH | _RESOLVE_NO_XDEV)


def _openat2(directory_fd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2), repeated at EAGAIN: the kernel gives up at ".." if a mount or rename happens meanwhile."""
    # struct open_how
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve | _RESOLVE_NO_MAGICLINKS)
    name = ctypes.c_char_p(os.fsencode(path))
    for _ in range(_OPEN_ATTEMPTS):
        try:
            return _syscall(_SYS_OPENAT2, f"open {path}", directory_fd, name, ctypes.byref(how), ctypes.sizeof(how))
        except BlockingIOError as error:
            failure = error
    raise failure


def open_by_handle(mount_fd: int, kind: int, handle: bytes, flags: int) -> int:
    """open_by_handle_at(2) on the file system of `mount_fd`."""
    # struct file_handle
    value = ctypes.c_char_p(len(handle).to_bytes(4, sys.byteorder) + kind.to_bytes(4, sys.byteorder) + handle)
    arguments = ctypes.c_int(mount_fd), value, ctypes.c_int(flags | os.O_CLOEXEC)
    return _check(_function("open_by_handle_at")(*arguments), "open_by_handle_at")


def detached_tmpfs(*, mode: int) -> int:
    """Return a directory descriptor of a new, detached tmpfs, which vanishes with its last descriptor."""
    return detached("tmpfs", mode=f"{mode:o}")


def detached(fstype: str, **options: str) -> int:
    """Return a directory descriptor of a detached file system; the mount vanishes with its last descriptor."""
    context = _syscall(_SYS_FSOPEN, f"fsopen {fstype}", ctypes.c_char_p(fstype.encode()), _FSOPEN_CLOEXEC)
    try:
        what = f"fsconfig {fstype}"
        for name, text in options.items():
            key, value = ctypes.c_char_p(name.encode()), ctypes.c_char_p(text.encode())
            _syscall(_SYS_FSCONFIG, what, context, _FSCONFIG_SET_STRING, key, value, 0)
        _syscall(_SYS_FSCONFIG, what, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mounted = _syscall(_SYS_FSMOUNT, f"fsmount {fstype}", context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mounted)
    finally:
        os.close(mounted)


def open_tree(path: str | os.PathLike[str], *, recursive: bool, dir_fd: int = _AT_FDCWD) -> int:
    """open_tree(2): return a detached copy of the mount at `path`; `recursive`: with those below it.

    If `path` is empty, copy what `dir_fd` (an O_PATH descriptor) stands for.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    flags |= 0 if os.fspath(path) else _AT_EMPTY_PATH
    name = ctypes.c_char_p(os.fsencode(path))
    return _syscall(_SYS_OPEN_TREE, f"open_tree {os.fspath(path)}", dir_fd, name, flags)


def move_mount(tree_fd: int, target_fd: int) -> None:
    """move_mount(2): move a mount, or attach a copy made by open_tree, onto an O_PATH descriptor."""
    empty = ctypes.c_char_p(b"")
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_SYS_MOVE_MOUNT, "move_mount", tree_fd, empty, target_fd, empty, flags)


def mount_setattr(fd: int, *, set: int, clear: int, recursive: bool, propagation: int = 0, userns_fd: int = 0) -> None:
    """mount_setattr(2) on the mount of a descriptor; `recursive`: and on all below it."""
    attributes = (ctypes.c_uint64 * 4)(set, clear, propagation, userns_fd)  # struct mount_attr
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    empty = ctypes.c_char_p(b"")
    _syscall(_SYS_MOUNT_SETATTR, "mount_setattr", fd, empty, flags, ctypes.byref(attributes), 32)


def join_session_keyring(name: str) -> None:
    """keyctl(2): give this process a new session keyring; do nothing if the kernel lacks keyrings."""
    try:
        _syscall(_number("keyctl"), "keyctl", _KEYCTL_JOIN_SESSION_KEYRING, ctypes.c_char_p(os.fsencode(name)))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise


def ioprio_set(io_class: int, level: int, thread: int = 0) -> None:
    """ioprio_set(2) for this thread or another one."""
    value = io_class << _IOPRIO_CLASS_SHIFT | level
    _syscall(_number("ioprio_set"), "ioprio_set", _IOPRIO_WHO_PROCESS, thread, value)


def ioprio_get(thread: int) -> tuple[int, int]:
    """ioprio_get(2): return class and level of a thread."""
    value = _syscall(_number("ioprio_get"), "ioprio_get", _IOPRIO_WHO_PROCESS, thread)
    return value >> _IOPRIO_CLASS_SHIFT, value & (1 << _IOPRIO_CLASS_SHIFT) - 1


def timerfd_gettime(fd: int) -> None:
    """timerfd_gettime(2), for its side effect: it restarts a periodic timer that has expired."""
    _check(_function("timerfd_gettime")(fd, (ctypes.c_char * 32)()), "timerfd_gettime")


def timerfd_settime(fd: int, flags: int, value: int, interval: int) -> None:
    """timerfd_settime(2), times in nanoseconds."""
    parts = [number for time in (interval, value) for number in divmod(time, 1_000_000_000)]
    wanted = (ctypes.c_long * 4)(*parts)  # struct itimerspec
    _check(_function("timerfd_settime")(fd, flags, ctypes.byref(wanted), None), "timerfd_settime")


def share_semaphore_undo(pid: int, other: int) -> bool:
    """kcmp(2): return whether two processes share one semop(2) undo list, or neither has one."""
    return _syscall(_number("kcmp"), "kcmp", pid, other, _KCMP_SYSVSEM, 0, 0) == 0


def landlock_version() -> int:
    """Return the version of Landlock's interface, 0 if the kernel lacks it or has it disabled (landlock(7))."""
    try:
        return _syscall(_SYS_LANDLOCK_CREATE_RULESET, "landlock_create_ruleset", None, 0, _LANDLOCK_VERSION)
    except OSError:
        return 0


def sched_getattr(thread: int) -> tuple[int, int, int, int, int]:
    """sched_getattr(2): return policy, flags, nice value, priority and runtime (nanoseconds) of a thread."""
    buffer = (ctypes.c_char * 56)()
    _syscall(_number("sched_getattr"), "sched_getattr", thread, buffer, 56, 0)
    parts = ((4, 4), (8, 8), (16, 4), (20, 4), (24, 8))
    found = [int.from_bytes(buffer.raw[at : at + size], sys.byteorder, signed=at == 16) for at, size in parts]
    return found[0], found[1], found[2], found[3], found[4]


def sched_setattr(
    policy: int, flags: int, nice: int, priority: int, times: tuple[int, int, int], thread: int = 0
) -> None:
    """sched_setattr(2) for this thread or another one; times are runtime, deadline and period in nanoseconds."""
    attributes = bytearray(56)  # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period, ...
    for offset, size, value in (
        (0, 4, 56), (4, 4, policy), (8, 8, flags), (16, 4, nice), (20, 4, priority),
        (24, 8, times[0]), (32, 8, times[1]), (40, 8, times[2]),
    ):  # fmt: skip
        attributes[offset : offset + size] = value.to_bytes(size, sys.byteorder, signed=value < 0)
    buffer = (ctypes.c_char * 56).from_buffer(attributes)
    _syscall(_number("sched_setattr"), "sched_setattr", thread, ctypes.byref(buffer), 0)


def personality(domain: int) -> None:
    """personality(2)"""
    _check(_function("personality")(ctypes.c_ulong(domain)), f"personality {domain:#x}")


def bpf(command: int, layout: str, *values: int | bytes | bytearray) -> tuple[int, bytes]:
    """bpf(2): return its result, and its attributes as the kernel leaves them.

    `layout` and `values` make the attributes, as for struct.pack. A value of bytes stands for its address (use Q); the
    kernel may write to a bytearray.
    """
    import struct

    buffers: list[Any] = []
    numbers: list[int] = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        kind = ctypes.c_char * len(value)
        buffers.append(kind.from_buffer(value) if isinstance(value, bytearray) else kind.from_buffer_copy(value))
        numbers.append(ctypes.addressof(buffers[-1]))
    packed = struct.pack(f"={layout}", *numbers)
    attributes = (ctypes.c_char * len(packed)).from_buffer_copy(packed)
    result = _syscall(_number("bpf"), f"bpf {command}", command, ctypes.byref(attributes), len(packed))
    return result, attributes.raw


SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3

_SYS_PIDFD_GETFD = 438
_PTRACE_GETEVENTMSG = 0x4201
_SECCOMP_SET_MODE_FILTER = 1


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def seccomp_set_filter(program: bytes | None, flags: int) -> int:
    """seccomp(2) SECCOMP_SET_MODE_FILTER for this thread; `program` is an array of struct sock_filter.

    Return the listener with SECCOMP_FILTER_FLAG_NEW_LISTENER, else 0. If `program` is None, load nothing and probe the
    flags: the call fails with EFAULT if the kernel knows them all, else with EINVAL.
    """
    argument = None if program is None else ctypes.byref(_SockFprog(len(program) // 8, program))
    return _syscall(_number("seccomp"), "load the seccomp filter", _SECCOMP_SET_MODE_FILTER, flags, argument)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): return a duplicate of another process's descriptor, close-on-exec."""
    return _syscall(_SYS_PIDFD_GETFD, f"pidfd_getfd {number}", pidfd, number, 0)


def duplicate(pid: int, number: int) -> int:
    """Return a duplicate of a descriptor of the process `pid`, close-on-exec."""
    pidfd = os.pidfd_open(pid)
    try:
        return pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)


def getsockopt(fd: int, level: int, option: int, request: bytes) -> bytes:
    """getsockopt(2) for options that take a `request` in the buffer; the answer is at most as long."""
    buffer, length = (ctypes.c_char * len(request)).from_buffer_copy(request), (ctypes.c_uint32 * 1)(len(request))
    arguments = (ctypes.c_int(fd), ctypes.c_int(level), ctypes.c_int(option), buffer, ctypes.byref(length))
    _check(_function("getsockopt")(*arguments), f"getsockopt {level}:{option}")
    return bytes(buffer)[: length[0]]


def has_hidden_filter(fd: int) -> bool:
    """Return whether a socket has a filter that cannot be read back, which is an eBPF program."""
    length = (ctypes.c_uint32 * 1)(0)
    arguments = (ctypes.c_int(fd), ctypes.c_int(_SOL_SOCKET), ctypes.c_int(_SO_GET_FILTER))
    if _function("getsockopt")(*arguments, None, ctypes.byref(length)) == 0:
        return False
    return ctypes.get_errno() == errno.EACCES
