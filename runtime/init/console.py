"""Make a container's terminal: a pseudo terminal of its own devpts, whose master goes to the owner of the console.

See pty(7), ioctl_tty(2), pts(4). The slave becomes /dev/console, and the program's 0, 1 and 2.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from runtime import sync
from runtime.errors import StartFailed
from runtime.init.program import own_stream
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from runtime.spec.process import Process

_TIOCSCTTY, _TIOCSWINSZ, _TIOCSPTLCK, _TIOCGPTPEER = 0x540E, 0x5414, 0x40045431, 0x5441
_PTMX = os.makedev(5, 2)


def open_terminal(process: Process, owner: socket.socket, *, console: bool) -> None:
    """Make a terminal in the container's root, make it this session's and use it for 0, 1 and 2.

    Send the master over `owner`. With `console` mount the slave on /dev/console too. Raises StartFailed.
    """
    try:
        master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if os.fstat(master).st_rdev != _PTMX:
            raise OSError(errno.ENODEV, "/dev/pts/ptmx is not a pseudo terminal")
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        if process.console_size is not None:
            resize(slave, *process.console_size)
        if console:
            _mount_console(slave)
        sync.pass_fd(owner, master, b"/dev/ptmx")
        os.close(master)
        fcntl.ioctl(slave, _TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        os.close(slave)
        own_stream(0, process.uid)
    except OSError as error:
        raise StartFailed(f"process.terminal: cannot be made: {error.strerror}") from None


def _mount_console(slave: int) -> None:
    """Bind the slave on /dev/console, by descriptors only because a path in the image could be a symbolic link."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        target = os.open("/dev/console", flags)
    except FileNotFoundError:
        try:
            os.close(os.open("/dev/console", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            pass  # another container that shares /dev has made it meanwhile
        target = os.open("/dev/console", flags)
    if stat.S_ISLNK(os.fstat(target).st_mode):
        raise OSError(errno.ELOOP, "/dev/console is a symbolic link")
    tree = syscalls.open_tree("", dir_fd=slave, recursive=False)
    syscalls.move_mount(tree, target)
    os.close(tree)
    os.close(target)


def resize(fd: int, rows: int, columns: int) -> None:
    """Set the size, in characters, of the terminal `fd`."""
    fcntl.ioctl(fd, _TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
