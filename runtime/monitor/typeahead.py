"""Take unread input out of a terminal, and put it back as if it had stayed there.

CRIU does not carry it if the terminal's master is outside the dumped processes. No process may read from the terminal
meanwhile, so its processes must be frozen. See termios(3), ioctl_tty(2), drivers/tty/n_tty.c.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import termios

_LIMIT = 64 << 10
_ARRIVAL = 200  # milliseconds
_LFLAG, _CC = 3, 6
_QUIET = ~(termios.ECHO | termios.ECHONL | termios.ISIG)
_EDITING = (termios.VERASE, termios.VKILL, termios.VWERASE, termios.VREPRINT, termios.VLNEXT)


def take(slave: int) -> bytes:
    """Return all unread input of the non-blocking descriptor `slave`; leave the terminal's settings unchanged.

    In canonical mode the byte 0 stands for an end of file (Ctrl-D).
    """
    before = termios.tcgetattr(slave)
    if not before[_LFLAG] & termios.ICANON:
        return _read_all(slave)
    ends = (b"\n", *(before[_CC][number] for number in (termios.VEOL, termios.VEOL2)))
    found = b""
    try:
        while len(found) < _LIMIT:
            line = os.read(slave, 1 << 16)
            found += line if line[-1:] in ends and line else line + b"\0"
    except OSError:
        pass  # no complete line is left, and input on its way has arrived
    plain = [*before[:_CC], [*before[_CC]]]  # an incomplete line can only be read in non-canonical mode
    plain[_LFLAG] &= _QUIET & ~termios.ICANON
    plain[_CC][termios.VMIN], plain[_CC][termios.VTIME] = 1, 0
    termios.tcsetattr(slave, termios.TCSANOW, plain)
    try:
        return found + _read_all(slave)
    finally:
        termios.tcsetattr(slave, termios.TCSANOW, before)


def _read_all(slave: int) -> bytes:
    found = b""
    try:
        while len(found) < _LIMIT and (data := os.read(slave, 4096)):
            found += data
    except OSError:
        pass  # nothing left, or the terminal was hung up
    return found


def put(master: int, slave: int, data: bytes) -> None:
    """Put back through the master what `take` returned, as far as there is room. Raises OSError."""
    if not data:
        return
    before = termios.tcgetattr(slave)
    quiet = [*before[:_CC], [*before[_CC]]]
    quiet[0] = 0  # translate nothing a second time, echo nothing, and send no signals
    quiet[_LFLAG] &= _QUIET
    waiting = len(data)
    if before[_LFLAG] & termios.ICANON:
        for number in _EDITING:
            quiet[_CC][number] = b"\0"
        end = bytes([next((byte for byte in range(255, 0, -1) if byte not in data), 4)])
        quiet[_CC][termios.VEOF] = end
        ends = [b"\n", b"\0", *(before[_CC][number] for number in (termios.VEOL, termios.VEOL2))]
        waiting = max(data.rfind(mark) for mark in ends) + 1 - data.count(b"\0")
        data = data.replace(b"\0", end)
    termios.tcsetattr(slave, termios.TCSANOW, quiet)
    try:
        while data:
            data = data[os.write(master, data) :]
        _await(slave, waiting)
    except BlockingIOError:
        pass  # the terminal is full
    finally:
        termios.tcsetattr(slave, termios.TCSANOW, before)


def _await(slave: int, count: int) -> None:
    """Wait, for _ARRIVAL ms at most, until `count` bytes have arrived, which takes a moment after a write."""
    poll = select.poll()
    poll.register(slave, select.POLLIN)
    for _ in range(_ARRIVAL):
        poll.poll(1)  # this also makes the kernel process pending input
        if int.from_bytes(fcntl.ioctl(slave, termios.FIONREAD, bytes(4)), sys.byteorder) >= count:
            return
