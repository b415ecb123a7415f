"""What was typed into a terminal and not read yet, taken out of it and put back, as if it had stayed there.

CRIU leaves it behind when the other end of the terminal is not among the processes that it dumps. Nobody may read from
the terminal meanwhile: its processes are frozen. termios(3), ioctl_tty(2); drivers/tty/n_tty.c.
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
    """Read all that is waiting behind the non-blocking descriptor `slave`; the terminal's settings stay as they are.

    Where lines are edited, the mark of an end of file (Ctrl-D) is the byte 0.
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
        pass  # no more whole lines, and what was on its way to here has arrived
    plain = [*before[:_CC], [*before[_CC]]]  # a line that is not complete can only be read in another mode
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
    """Put back what `take` has found, through the master, as far as there is room. Raises OSError."""
    if not data:
        return
    before = termios.tcgetattr(slave)
    quiet = [*before[:_CC], [*before[_CC]]]
    quiet[0] = 0  # nothing is translated a second time, and nothing is echoed or means a signal
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
        pass  # it is full
    finally:
        termios.tcsetattr(slave, termios.TCSANOW, before)


def _await(slave: int, count: int) -> None:
    """What is written to a master arrives a little later: wait for it, for a moment at most."""
    poll = select.poll()
    poll.register(slave, select.POLLIN)
    for _ in range(_ARRIVAL):
        poll.poll(1)  # which also makes the kernel take it over
        if int.from_bytes(fcntl.ioctl(slave, termios.FIONREAD, bytes(4)), sys.byteorder) >= count:
            return
