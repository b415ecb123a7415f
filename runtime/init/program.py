"""Become the program of the container: limits, labels, identity, capabilities, seccomp, and exec.

This runs inside the container's namespaces. The kernel dictates the order: steps that need privileges come before the
privileges are given up, and the seccomp filter, which could forbid any step, is loaded as late as possible.
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
    """Raise hard limits to the requested values, because a user namespace can only lower them. Raises StartFailed.

    limit_self does the rest, late, because a limit could prevent the setup itself.
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
    """Run on these processors only; do nothing if there are none. Raises StartFailed naming the field."""
    if numbers:
        try:
            os.sched_setaffinity(0, numbers)
        except OSError as error:
            raise StartFailed(f"process.execCPUAffinity.{name}: cannot be set: {error.strerror}") from None


def schedule_self(process: Process, *, forks: bool = False) -> None:
    """Set the scheduling policy; `forks`: a child must inherit it. Raises StartFailed naming the field."""
    scheduler = process.scheduler
    if scheduler is None:
        return
    if forks and (scheduler.policy == SCHED_POLICIES["SCHED_DEADLINE"] or scheduler.flags & _RESET_ON_FORK):
        # Inside the user namespace it cannot be set, because its root has no CAP_SYS_NICE over the host.
        raise StartFailed(
            "process.scheduler: SCHED_DEADLINE and SCHED_FLAG_RESET_ON_FORK are not supported with a user namespace"
        )
    times = (scheduler.runtime, scheduler.deadline, scheduler.period)
    try:
        syscalls.sched_setattr(scheduler.policy, scheduler.flags, scheduler.nice, scheduler.priority, times)
    except OSError as error:
        raise StartFailed(f"process.scheduler: cannot be set: {os.strerror(error.errno or 0)}") from None


def require_labels(process: Process, mount_label: str | None) -> None:
    """Raise NotSupported if the spec has a label of a security module that this kernel does not run."""
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
    """Return the path of args[0], looked up in the PATH of `env`. Raises StartFailed in words that engines parse."""
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
    """Change to `cwd`; make it if it is missing. Raises StartFailed.

    Fail if the directory is outside the container, which an open descriptor of the host's could lead to
    (/proc/self/fd/N). getcwd(3) fails there, because the kernel's answer is not an absolute path.
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
            raise OSError(errno.ENOENT, "is outside the container") from None
    except OSError as error:
        raise StartFailed(f"process.cwd: {process.cwd}: {error.strerror}") from None


def join_groups(process: Process, own: OwnProc) -> None:
    """Replace the supplementary groups by `additional_gids`. Raises StartFailed."""
    try:
        os.setgroups(process.additional_gids)
    except OSError as error:
        # An unprivileged user namespace denies it, which matters only if the spec has groups.
        if process.additional_gids or error.errno != errno.EPERM or _may_set_groups(own):
            message = f"process.user.additionalGids: cannot be set: {error.strerror}"
            raise StartFailed(message) from None


def _may_set_groups(own: OwnProc) -> bool:
    try:
        return own.read("setgroups") == "allow"
    except OSError:
        return True


def become_user(process: Process, seccomp: Callable[[], None] | None) -> str:
    """Change user, group, capabilities and no_new_privs for good; return the program's path, as that user finds it.

    `seccomp` loads a filter. Without no_new_privs that needs CAP_SYS_ADMIN, so it is loaded before the capabilities
    are given up. Raises StartFailed naming the field.
    """
    sets = capabilities.NONE if process.capabilities is None else process.capabilities
    try:
        field = "process.capabilities"
        _drop_bounding(capabilities.mask(sets["bounding"]))
        syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
        field = f"process.user: cannot become {process.uid}:{process.gid}"
        os.setresgid(process.gid, process.gid, process.gid)
        os.setresuid(process.uid, process.uid, process.uid)
        # The specification keeps the caller's umask; runc always sets 022, because its callers have 0.
        os.umask(os.umask(0o022) | 0o022 if process.umask is None else process.umask)
        program = find_program(process)
        field = "process.capabilities"
        _, held, _ = syscalls.capget()  # by system call, because RLIMIT_NOFILE may allow no descriptor for /proc
        if seccomp is not None and not process.no_new_privileges:
            syscalls.capset(held, held, 0)  # inheritable: none, because capset(2) limits it to the bounding set
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
    """Drop capabilities from the bounding set, before the user changes because that needs CAP_SETPCAP."""
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
    """Set effective, permitted, inheritable and ambient, as far as this process holds the capabilities itself.

    capabilities.warn has warned about those that this process lacks.
    """
    mask = capabilities.mask
    syscalls.capset(mask(sets["effective"]) & held, mask(sets["permitted"]) & held, mask(sets["inheritable"]) & held)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    wanted = mask(sets["ambient"]) & mask(sets["permitted"]) & mask(sets["inheritable"]) & held
    for number in range(wanted.bit_length()):
        if wanted >> number & 1:
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)


def execute(process: Process, program: str) -> NoReturn:
    """Execute the program with the spec's environment. Raises StartFailed."""
    environment: dict[str, str] = {}
    for entry in process.env:
        name, _, value = entry.partition("=")
        if name:
            environment[name] = value  # the last one wins, as with runc
    environment.setdefault("HOME", _home(process.uid))
    try:
        os.execve(program, list(process.args), environment)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        reason = "exec format error" if number == errno.ENOEXEC else (os.strerror(number).lower() if number else error)
        raise StartFailed(f"process.args[0]: exec: {process.args[0]!r}: {reason}") from None


def own_null(fd: int) -> None:
    """Replace the host's null device at `fd` by the container's own, because CRIU could not dump the host's.

    Check that it is a null device, because a writer of the container's /dev can have put something else there.
    """
    if os.fstat(fd).st_rdev != _NULL:
        return
    try:
        own = os.open("/dev/null", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # the container has none
    if os.fstat(own).st_rdev == _NULL:
        os.dup2(own, fd)
    os.close(own)


def own_stream(fd: int, uid: int) -> None:
    """Give a pipe or terminal on a standard stream to the user, because programs reopen it as /dev/stdout."""
    there = os.fstat(fd)
    if there.st_uid != uid and not stat.S_ISREG(there.st_mode) and there.st_rdev != _NULL:
        try:
            os.fchown(fd, uid, -1)
        except OSError:
            pass  # a read-only file system, or an owner unknown in this user namespace: it works without


def loader(seccomp: Filter, sock: socket.socket) -> Callable[[], None]:
    """Return a function that loads a filter, and passes its listener to the other side of the handshake if it notifies.

    After loading it calls only write, read and close, which the filter is expected to allow.
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
    """Reset all signal handlers and unblock all signals."""
    for number in range(1, signals.NSIG):
        if signals.getsignal(number) not in (signals.SIG_DFL, None):
            signals.signal(number, signals.SIG_DFL)
    signals.pthread_sigmask(signals.SIG_SETMASK, ())


def _home(uid: int) -> str:
    """Return the user's home directory by the container's /etc/passwd, "/" if it has none."""
    try:
        with open("/etc/passwd", errors="surrogateescape") as file:
            for line in file:
                fields = line.rstrip("\n").split(":")
                if len(fields) > 5 and fields[2] == str(uid):
                    return fields[5] or "/"
    except OSError:
        pass  # the container has no user database
    return "/"
