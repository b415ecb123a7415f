"""Running a module of this very code in a fresh interpreter, and keeping a container's hands off the interpreter."""

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
    """The directory on sys.path that this package was loaded from."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def command(module: str, *args: str) -> list[str]:
    """An argv that runs `module.main(args)` isolated from the environment and without site-packages."""
    start = f"import sys; sys.path.insert(0, {_origin()!r}); from {module} import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable or "/usr/bin/python3", "-I", "-S", "-c", start, *args]


def is_sealed() -> bool:
    """Whether nobody can write to our interpreter's file through /proc/PID/exe, even after all that run it have ended.

    A container can name the interpreter of its init as /proc/self/exe while it is set up, and keep it open. As long as
    some process runs the file the kernel refuses to write to it (ETXTBSY), but the monitor may be killed.
    """
    path = os.readlink("/proc/self/exe")
    if path.startswith(PLACE + "/"):
        return bool(os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY)
    return os.geteuid() != 0 and _is_out_of_reach("/proc/self/exe")


def _is_out_of_reach(path: str) -> bool:
    return os.stat(path).st_uid == 0 and not os.access(path, os.W_OK)


def _seal_launcher() -> None:
    """Let the next start of the command come from a sealed interpreter at once.

    The launcher names PLACE/python3, a symbolic link to the host's interpreter; a read-only mount of that one's
    directory covers it from the first container after boot on. A directory, because a new version that is installed
    later appears in it, and because the file itself cannot be replaced while something is mounted on it.
    """
    import fcntl

    from runtime.linux import syscalls
    from runtime.linux.mount_flags import ATTR_RDONLY

    there = os.open(PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(there, fcntl.LOCK_EX)
        if os.fstat(there).st_uid or os.statvfs(PLACE).f_flag & os.ST_RDONLY:
            return  # another one was faster
        tree = syscalls.open_tree(os.path.dirname(os.path.realpath("/proc/self/exe")), recursive=False)
        try:
            syscalls.mount_setattr(tree, set=ATTR_RDONLY, clear=0, recursive=False)
            syscalls.move_mount(tree, there)
        finally:
            os.close(tree)
    finally:
        os.close(there)


def sealed() -> int:
    """A descriptor of our interpreter in a read-only mount that is mounted nowhere.

    A process that was started from it cannot be used to write to the file, not even by root of its container: the
    kernel takes what /proc/PID/exe says with the mount it belongs to. Where such a mount cannot be made (no privilege,
    Linux before 5.12), the file itself, if it is out of our reach, or else a copy of it that nobody can change.
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
    """Become a command of ours, under the sealed interpreter."""
    if os.path.dirname(sys.executable) == PLACE and not os.geteuid():
        try:
            _seal_launcher()
        except OSError:
            pass  # it only costs time
    os.execv(f"/proc/self/fd/{sealed()}", argv)


def spawn_sealed(argv: list[str], keep: Sequence[int]) -> int:
    """Start a command of ours from the sealed interpreter, with the descriptors `keep`; returns its pid."""
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
    """From here on no module is loaded from a file: the files are about to be the container's.

    What is needed later has to be imported before.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") in _EMBEDDED]
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


_EMBEDDED = ("BuiltinImporter", "FrozenImporter")
