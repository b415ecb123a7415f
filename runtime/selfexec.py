"""Running a module of this very code in a fresh interpreter, and keeping a container's hands off the interpreter."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def _origin() -> str:
    """The directory or zip file on sys.path that this package was loaded from."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(module: str, *args: str) -> list[str]:
    """An argv that runs `module.main(args)` isolated from the environment and without site-packages."""
    start = f"import sys; sys.path.insert(0, {_origin()!r}); from {module} import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable or "/usr/bin/python3", "-I", "-S", "-c", start, *args]


def is_write_protected() -> bool:
    """Whether the kernel refuses to write to a program that runs (ETXTBSY; Linux 6.11 and 6.12 had given that up).

    A container can name the runtime's interpreter as /proc/self/exe while it is set up, and wait for a moment to write
    to it. As long as its monitor, or whoever waits for it, runs the same file, the kernel does not let it. Nobody does
    where an engine is the monitor: then the interpreter has to be a sealed one.
    """
    try:
        os.close(os.open("/proc/self/exe", os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return True
    return False


def sealed() -> int:
    """A descriptor of our interpreter in a read-only mount that is mounted nowhere.

    A process that was started from it cannot be used to write to the file, not even by root of its container: the
    kernel takes what /proc/PID/exe says with the mount it belongs to. Without the privilege to make such a mount, the
    file itself, if it is root's, or else a copy of it that nobody can change.
    """
    from runtime import syscalls
    from runtime.mount_spec import ATTR_RDONLY

    path = os.path.realpath("/proc/self/exe")
    try:
        tree = syscalls.open_tree(path, recursive=False)
    except PermissionError:
        return _unprivileged(path)
    syscalls.mount_setattr(tree, set=ATTR_RDONLY, clear=0, recursive=False)
    return tree


def _unprivileged(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    there = os.fstat(fd)
    if there.st_uid == 0 and not os.access(path, os.W_OK):
        return fd
    import fcntl

    copy = os.memfd_create("interpreter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    while os.sendfile(copy, fd, None, there.st_size):
        pass
    os.close(fd)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
    return copy


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
