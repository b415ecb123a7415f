"""Run a module of this code in a fresh interpreter, and keep the interpreter's file safe from containers."""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

PLACE = "/opt/pymigrate/sealed"  # vagrant/provision.sh makes it


def _origin() -> str:
    """Return the directory on sys.path from which this package was loaded."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def command(module: str, *args: str) -> list[str]:
    """Return an argv that runs `module.main(args)`, isolated from the environment and without site-packages."""
    start = f"import sys; sys.path.insert(0, {_origin()!r}); from {module} import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable or "/usr/bin/python3", "-I", "-S", "-c", start, *args]


def is_sealed() -> bool:
    """Return whether no process can write to this interpreter's file through /proc/PID/exe, even when none runs it.

    A container can open its init's interpreter as /proc/self/exe while it is set up, and keep it open. While a process
    runs the file, the kernel rejects writing to it (ETXTBSY), but all of them, even the monitor, may be killed.
    """
    path = os.readlink("/proc/self/exe")
    if path.startswith(PLACE + "/"):
        return bool(os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY)
    return os.geteuid() != 0 and _is_out_of_reach("/proc/self/exe")


def _is_out_of_reach(path: str) -> bool:
    return os.stat(path).st_uid == 0 and not os.access(path, os.W_OK)


def _seal_launcher() -> None:
    """Make later commands start from a sealed interpreter directly.

    The launcher runs PLACE/python3, a symbolic link to the host's interpreter. From the first container after boot, a
    read-only mount of the interpreter's directory covers PLACE. It is the directory, because a version installed later
    appears in it, and because the file could not be replaced while something is mounted on it.
    """
    import fcntl

    from runtime.linux import syscalls
    from runtime.linux.mount_flags import ATTR_RDONLY

    there = os.open(PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(there, fcntl.LOCK_EX)
        if os.fstat(there).st_uid or os.statvfs(PLACE).f_flag & os.ST_RDONLY:
            return  # another process was faster
        tree = syscalls.open_tree(os.path.dirname(os.path.realpath("/proc/self/exe")), recursive=False)
        try:
            syscalls.mount_setattr(tree, set=ATTR_RDONLY, clear=0, recursive=False)
            syscalls.move_mount(tree, there)
        finally:
            os.close(tree)
    finally:
        os.close(there)


def sealed() -> int:
    """Return a descriptor of this interpreter in a detached read-only mount.

    A process started from it does not give even its container's root a way to write to the file, because the kernel
    resolves /proc/PID/exe with its mount. If such a mount cannot be made (no privilege, Linux before 5.12), return the
    file itself if this user cannot write to it, or else an immutable copy.
    """
    from runtime.linux import syscalls
    from runtime.linux.mount_flags import ATTR_RDONLY

    path = os.path.realpath("/proc/self/exe")
    try:
        tree = syscalls.open_tree(path, recursive=False)
        syscalls.mount_setattr(tree, set=ATTR_RDONLY, clear=0, recursive=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        return _unprivileged(path)
    return tree


def _unprivileged(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if _is_out_of_reach(path):
        return fd
    import fcntl

    copy = os.memfd_create("interpreter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    while os.sendfile(copy, fd, None, os.fstat(fd).st_size):
        pass
    os.close(fd)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
    return copy


def execute(argv: list[str]) -> NoReturn:
    """Execute an argv from `command` with the sealed interpreter."""
    if os.path.dirname(sys.executable) == PLACE and not os.geteuid():
        try:
            _seal_launcher()
        except OSError:
            pass  # only later commands start more slowly
    os.execv(f"/proc/self/fd/{sealed()}", argv)


def spawn_sealed(argv: list[str], keep: Sequence[int]) -> int:
    """Start an argv from `command` with the sealed interpreter and the descriptors `keep`; return its pid."""
    program = sealed()
    for fd in keep:
        os.set_inheritable(fd, True)
    try:
        # The descriptor of the program is closed by the exec itself.
        return os.posix_spawn(f"/proc/self/fd/{program}", argv, os.environ)
    finally:
        for fd in keep:
            os.set_inheritable(fd, False)
        os.close(program)


def forbid_imports() -> None:
    """Prevent imports from files from here on, because the files are about to be the container's.

    Modules that are needed later must be imported before.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") in _EMBEDDED]
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


_EMBEDDED = ("BuiltinImporter", "FrozenImporter")
