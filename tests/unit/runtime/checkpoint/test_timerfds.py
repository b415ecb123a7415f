"""Timers of this process, noted and set again: whatever the kernel takes is carried."""

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.checkpoint import timerfds

MONOTONIC, WALL = 1, 0
ABSOLUTE, CANCEL_ON_SET = 1, 2
END = (1 << 63) - 1  # seconds: the largest that a program can ask for
YEAR_2128 = 5_000_000_000
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def make() -> Iterator[object]:
    made: list[int] = []

    def timer(clock: int, flags: int, seconds: int, interval: int = 0) -> int:
        fd = libc.timerfd_create(clock, os.O_NONBLOCK | os.O_CLOEXEC)
        assert fd >= 0
        made.append(fd)
        assert libc.timerfd_settime(fd, flags, struct.pack("qqqq", interval, 0, seconds, 0), None) == 0
        return int(fd)

    yield timer
    for fd in made:
        os.close(fd)


def shown(fd: int) -> dict[str, str]:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


def left(fd: int) -> int:
    return int(shown(fd)["it_value"].strip("()").partition(",")[0])


@pytest.mark.parametrize(
    ("clock", "flags", "seconds", "interval"),
    [
        (WALL, ABSOLUTE, YEAR_2128, 0),
        (WALL, ABSOLUTE, END, 0),
        (WALL, ABSOLUTE | CANCEL_ON_SET, END, 0),
        (WALL, ABSOLUTE | CANCEL_ON_SET, YEAR_2128, 10),
        (WALL, ABSOLUTE, END, END),
        (MONOTONIC, ABSOLUTE, END, END),
        (MONOTONIC, ABSOLUTE, 1 << 40, 1),
    ],
)
def test_times_far_in_the_future(make: object, clock: int, flags: int, seconds: int, interval: int) -> None:
    assert callable(make)
    fd = make(clock, flags, seconds, interval)
    before, ahead = shown(fd), left(fd)
    noted = [entry for entry in timerfds.save({os.getpid(): 7}) if entry["fd"] == fd]
    timerfds.check(noted)
    assert libc.timerfd_settime(fd, 0, struct.pack("qqqq", 0, 0, 0, 0), None) == 0
    timerfds.restore(noted, {7: os.getpid()})
    assert abs(left(fd) - ahead) <= 2
    assert shown(fd)["it_interval"] == before["it_interval"]
    if clock == WALL:  # one of the monotonic clock is set by the time left: that clock may stand elsewhere
        assert shown(fd)["settime flags"] == before["settime flags"]


def test_a_note_of_an_older_version_is_read(make: object) -> None:
    assert callable(make)
    fd = make(WALL, 0, 1000)
    noted = [{"process": 1, "fd": fd, "ticks": 0, "value": 500 * 10**9, "interval": 0, "absolute": 0}]
    timerfds.check(noted)
    timerfds.restore(noted, {1: os.getpid()})
    assert 490 < left(fd) <= 500
