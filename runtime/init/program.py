"""Becoming the program of the container: limits, labels, identity, capabilities, seccomp, and exec.

Runs inside the container's namespaces. The order is the kernel's: what needs privileges comes before they are given
up, and a seccomp filter, which could forbid any of it, comes as late as its own conditions allow.
"""

from __future__ import annotations

import errno
import os
import resource
import stat

from runtime.errors import NotSupported, StartFailed
from runtime.light import signals
from runtime.light.records import Record
from runtime.linux import capabilities, syscalls
from runtime.linux.files import write as write_kernel
from runtime.spec.process import LIMIT_MAX, RLIMITS, SCHED_FLAGS, SCHED_POLICIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import NoReturn

    from runtime.linux.own_proc import OwnProc
    from runtime.spec.process import Process


_NULL = os.makedev(1, 3)
_RESET_ON_FORK = SCHED_FLAGS["SCHED_FLAG_RESET_ON_FORK"]


class Filter(Record):
    """A compiled seccomp filter: the BPF program and the flags of seccomp(2)."""

    program: bytes
    flags: int
    listener: bool


def limit_self(process: Process) -> None:
    """Set the rlimits. Raises StartFailed naming the field."""
    for limit in process.rlimits:
        soft, hard = (resource.RLIM_INFINITY if value == LIMIT_MAX else value for value in (limit.soft, limit.hard))
        _limit(limit.type, soft, hard)


def raise_limits(process: Process) -> None:
    """Make hard limits as high as they are asked for: in a user namespace they can only be lowered. Raises StartFailed.

    All else is for limit_self, which comes late: with what a limit forbids we could not set anything up.
    """
    for limit in process.rlimits:
        soft, hard = resource.getrlimit(RLIMITS[limit.type])
        wanted = resource.RLIM_INFINITY if limit.hard == LIMIT_MAX else limit.hard
        if hard != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > hard):
            _limit(limit.type, soft, wanted)


def _limit(kind: str, soft: int, hard: int) -> None:
    try:
        resource.setrlimit(RLIMITS[kind], (soft, hard))
    except (OSError, OverflowError, ValueError) as error:
        raise StartFailed(f"process.rlimits: cannot set {kind}: {error}") from None


def tune_self(process: Process) -> None:
    """Set the OOM score and I/O priority, which forks inherit. Raises StartFailed naming the field."""
    if process.oom_score_adj is not None:
        _set("process.oomScoreAdj", write_kernel, "/proc/self/oom_score_adj", str(process.oom_score_adj))
    if process.io_priority is not None:
        try:
            syscalls.ioprio_set(*process.io_priority)
        except OSError as error:
            raise StartFailed(f"process.ioPriority: cannot be set: {os.strerror(error.errno or 0)}") from None


def use_processors(name: str, numbers: tuple[int, ...]) -> None:
    """Run on these processors only; none leaves it to the kernel. Raises StartFailed naming the field."""
    if numbers:
        try:
            os.sched_setaffinity(0, numbers)
        except OSError as error:
            raise StartFailed(f"process.execCPUAffinity.{name}: cannot be set: {error.strerror}") from None


def schedule_self(process: Process, *, forks: bool = False) -> None:
    """Set the scheduling policy; `forks` tells that a child is to inherit it. Raises StartFailed naming the field."""
    scheduler = process.scheduler
    if scheduler is None:
        return
    if forks and (scheduler.policy == SCHED_POLICIES["SCHED_DEADLINE"] or scheduler.flags & _RESET_ON_FORK):
        # In the user namespace it could not be set any more: its root has no CAP_SYS_NICE that counts.
        raise StartFailed("process.scheduler: what a fork does not inherit is not supported with a user namespace")
    times = (scheduler.runtime, scheduler.deadline, scheduler.period)
    try:
        syscalls.sched_setattr(scheduler.policy, scheduler.flags, scheduler.nice, scheduler.priority, times)
    except OSError as error:
        raise StartFailed(f"process.scheduler: cannot be set: {os.strerror(error.errno or 0)}") from None


def require_labels(process: Process, mount_label: str | None) -> None:
    """Raise NotSupported when a label of a security module is asked for that this kernel does not run."""
    modules = ""
    if process.apparmor_profile or process.selinux_label or mount_label:
        try:
            with open("/sys/kernel/security/lsm") as file:
                modules = file.read()
        except OSError:
            modules = "selinux" if os.path.exists("/sys/fs/selinux/enforce") else ""
            modules += "apparmor" if os.path.isdir("/sys/module/apparmor") else ""
    for field, label, module in (
        ("process.apparmorProfile", process.apparmor_profile, "apparmor"),
        ("process.selinuxLabel", process.selinux_label, "selinux"),
        ("linux.mountLabel", mount_label, "selinux"),
    ):
        if label and module not in modules and label != "unconfined":
            raise NotSupported(f"config.json: {field}: this kernel does not run {module}")


def label_next_exec(process: Process, own: OwnProc) -> None:
    """Have the next exec take the AppArmor profile and SELinux label. Raises StartFailed naming the field."""
    if process.apparmor_profile and process.apparmor_profile != "unconfined":
        name = "attr/apparmor/exec" if own.has("attr/apparmor/exec") else "attr/exec"
        _set("process.apparmorProfile", own.write, name, f"exec {process.apparmor_profile}")
    if process.selinux_label:
        _set("process.selinuxLabel", own.write, "attr/exec", process.selinux_label)


def _set(field: str, write: Callable[[str, str], None], name: str, value: str) -> None:
    try:
        write(name, value)
    except OSError as error:
        raise StartFailed(f"{field}: cannot be set to {value!r}: {error.strerror}") from None


def find_program(process: Process) -> str:
    """The path of args[0], looked up in the PATH of `env`. Raises StartFailed in the words that engines look for."""
    name = process.args[0]
    if "/" in name:
        candidates = [name if name.startswith("/") else os.path.join(process.cwd, name)]
    else:
        path = next((entry[5:] for entry in reversed(process.env) if entry.startswith("PATH=")), os.defpath)
        candidates = [os.path.join(directory or ".", name) for directory in path.split(":")]
    denied = False
    for candidate in candidates:
        try:
            is_file = stat.S_ISREG(os.stat(candidate).st_mode)
        except OSError as error:
            denied = denied or isinstance(error, PermissionError)
            continue
        if is_file and os.access(candidate, os.X_OK):
            return candidate
        denied = denied or is_file or "/" in name
    if denied:
        raise StartFailed(f"process.args[0]: exec: {name!r}: permission denied")
    problem = "no such file or directory" if "/" in name else "executable file not found in $PATH"
    raise StartFailed(f"process.args[0]: exec: {name!r}: {problem}")


def enter_cwd(process: Process) -> None:
    """Change to `cwd`, which is made where it is missing. Raises StartFailed.

    A directory that is not in the container is refused: a descriptor of the host's, left open, would be the way to it
    (/proc/self/fd/N), and getcwd(3) then fails: the kernel's answer is not an absolute path.
    """
    try:
        try:
            os.chdir(process.cwd)
        except FileNotFoundError:
            os.makedirs(process.cwd, 0o755)
            os.chdir(process.cwd)
        try:
            os.getcwd()
        except FileNotFoundError:
            os.chdir("/")
            raise OSError(errno.ENOENT, "is outside of the container") from None
    except OSError as error:
        raise StartFailed(f"process.cwd: {process.cwd}: {error.strerror}") from None


def join_groups(process: Process, own: OwnProc) -> None:
    """Take the additional groups, and give up those that we have. Raises StartFailed."""
    try:
        os.setgroups(process.additional_gids)
    except OSError as error:
        # An unprivileged user namespace denies it; that matters only when groups were asked for.
        if process.additional_gids or error.errno != errno.EPERM or _may_set_groups(own):
            message = f"process.user.additionalGids: cannot be set: {error.strerror}"
            raise StartFailed(message) from None


def _may_set_groups(own: OwnProc) -> bool:
    try:
        return own.read("setgroups") == "allow"
    except OSError:
        return True


def become_user(process: Process, seccomp: Callable[[], None] | None) -> str:
    """Change user, group, capabilities and no_new_privs for good; returns the program, as that user finds it.

    `seccomp` loads a filter: without no_new_privs that needs CAP_SYS_ADMIN, and so comes before the capabilities are
    given up. Raises StartFailed naming the field.
    """
    sets = capabilities.NONE if process.capabilities is None else process.capabilities
    try:
        field = "process.capabilities"
        _drop_bounding(capabilities.mask(sets["bounding"]))
        syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
        field = f"process.user: cannot become {process.uid}:{process.gid}"
        os.setresgid(process.gid, process.gid, process.gid)
        os.setresuid(process.uid, process.uid, process.uid)
        # The specification leaves the caller's; runc always sets 022, because callers have 0.
        os.umask(os.umask(0o022) | 0o022 if process.umask is None else process.umask)
        program = find_program(process)
        field = "process.capabilities"
        _, held, _ = syscalls.capget()  # without a descriptor: the limit of them may be 0
        if seccomp is not None and not process.no_new_privileges:
            syscalls.capset(held, held, 0)  # nothing is inheritable beyond the bounding set, which is lower already
            field = "linux.seccomp"
            seccomp()
        field = "process.capabilities"
        _apply(sets, held)
        field = "process.noNewPrivileges"
        if process.no_new_privileges:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        field = "linux.seccomp"
        if seccomp is not None and process.no_new_privileges:
            seccomp()
    except OSError as error:
        raise StartFailed(f"{field}: {error.strerror or error}") from None
    return program


def _drop_bounding(keep: int) -> None:
    """Needs CAP_SETPCAP, so it comes before the user is changed."""
    for number in range(64):
        if keep >> number & 1:
            continue
        try:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return  # beyond the last that the kernel knows (capabilities(7))
            raise


def _apply(sets: dict[str, frozenset[str]], held: int) -> None:
    """Set effective, permitted, inheritable and ambient, as far as this process holds them itself.

    A capability that we lack cannot be given: capabilities.warn has said so.
    """
    mask = capabilities.mask
    syscalls.capset(mask(sets["effective"]) & held, mask(sets["permitted"]) & held, mask(sets["inheritable"]) & held)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    wanted = mask(sets["ambient"]) & mask(sets["permitted"]) & mask(sets["inheritable"]) & held
    for number in range(wanted.bit_length()):
        if wanted >> number & 1:
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)


def execute(process: Process, program: str) -> NoReturn:
    """exec, with the signals as a fresh process has them. Raises StartFailed."""
    environment: dict[str, str] = {}
    for entry in process.env:
        name, _, value = entry.partition("=")
        if name:
            environment[name] = value  # the last one holds, as with runc
    environment.setdefault("HOME", _home(process.uid))
    try:
        os.execve(program, list(process.args), environment)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        reason = "exec format error" if number == errno.ENOEXEC else (os.strerror(number).lower() if number else error)
        raise StartFailed(f"process.args[0]: exec: {process.args[0]!r}: {reason}") from None


def own_null(fd: int) -> None:
    """Put the container's own null device in the place of the host's, which CRIU could not dump.

    Only the null device itself will do: whoever may write to the container's /dev can have put something else there.
    """
    if os.fstat(fd).st_rdev != _NULL:
        return
    try:
        own = os.open("/dev/null", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # it has none
    if os.fstat(own).st_rdev == _NULL:
        os.dup2(own, fd)
    os.close(own)


def own_stream(fd: int, uid: int) -> None:
    """Give a pipe or a terminal on our standard streams to the user, who may want to open it by /dev/stdout again."""
    there = os.fstat(fd)
    if there.st_uid != uid and not stat.S_ISREG(there.st_mode) and there.st_rdev != _NULL:
        try:
            os.fchown(fd, uid, -1)
        except OSError:
            pass  # a read-only place, an owner unknown in this user namespace: it works without


def loader(seccomp: Filter, sock: socket.socket) -> Callable[[], None]:
    """What loads a filter; the other side of the handshake takes the listener of one that notifies.

    After that only write, read and close are called before the exec.
    """
    from runtime.seccomp.load import load

    fd = sock.fileno()

    def load_filter() -> None:
        listener = load(seccomp.program, seccomp.flags, listener=seccomp.listener)
        if listener is not None:
            os.write(fd, b'{"listener": %d}' % listener)
            os.read(fd, 64)
            os.close(listener)

    return load_filter


def reset_signals() -> None:
    """No signal handled, ignored or blocked, as a fresh process has them."""
    for number in range(1, signals.NSIG):
        if signals.getsignal(number) not in (signals.SIG_DFL, None):
            signals.signal(number, signals.SIG_DFL)
    signals.pthread_sigmask(signals.SIG_SETMASK, ())


def _home(uid: int) -> str:
    """The home directory that the container's own /etc/passwd gives the user."""
    try:
        with open("/etc/passwd", errors="surrogateescape") as file:
            for line in file:
                fields = line.rstrip("\n").split(":")
                if len(fields) > 5 and fields[2] == str(uid):
                    return fields[5] or "/"
    except OSError:
        pass  # no such file: then there is no user database
    return "/"
