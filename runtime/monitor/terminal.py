"""Show a container's terminal in the user's: raw mode, window size, copying both ways."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import termios
import tty

from runtime.linux.descriptors import read_some, write_all

_CHUNK = 1 << 16


class Raw:
    """Put the terminal `fd` into raw mode during a `with`; do nothing if it is not a terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        self._before = termios.tcgetattr(self._fd) if os.isatty(self._fd) else None
        if self._before is not None:
            tty.setraw(self._fd)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


def copy_size(source: int, target: int) -> None:
    """Give the terminal `target` the size of `source`, now and whenever that changes."""

    def copy(*_: object) -> None:
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, bytes(8))
        if struct.unpack("HHHH", size)[0]:
            fcntl.ioctl(target, termios.TIOCSWINSZ, size)

    if os.isatty(source):
        copy()
        signal.signal(signal.SIGWINCH, copy)


def pump(master: int) -> None:
    """Copy stdin to the master and its output to stdout, until all users have closed the slave."""
    poll = select.poll()
    os.set_blocking(master, False)  # a terminal takes little at a time, and only while its output is read
    pending, is_over = b"", _is_over(0)
    while True:
        poll.register(master, select.POLLIN | (select.POLLOUT if pending else 0))
        if not is_over and not pending:
            poll.register(0, select.POLLIN)
        for fd, event in poll.poll():
            if fd == 0:
                poll.unregister(0)
                pending = read_some(0, _CHUNK)
                if not pending:
                    is_over, pending = True, b"\x04"  # pass the end of file on to the terminal
                continue
            if event & select.POLLIN:
                try:
                    write_all(1, os.read(master, _CHUNK))
                except BlockingIOError:
                    pass  # another process has read it
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    return
            elif event & ~select.POLLOUT:
                return
            if event & select.POLLOUT and pending:
                try:
                    pending = pending[os.write(master, pending) :]
                except BlockingIOError:
                    continue


def _is_over(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False
