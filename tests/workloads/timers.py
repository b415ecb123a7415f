"""Clocks and timers."""

import ctypes
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator

from harness import call, equal, kind, make, near

_TIMER_ABSTIME, _CANCEL_ON_SET = 1, 2
# Seconds that a timer may be late: while CRIU dumps and restores, clocks go on and timers do not. None may be early.
_LATE, _EARLY = float(os.environ.get("LATE", "120")), 0.1
_APART = 1.5  # seconds that two looks at a busy machine are apart at most, or the wall clocks of two machines
_SLEEP = float(os.environ.get("SLEEP", "4"))  # seconds in which the move begins


def _left(found: float, expected: float) -> None:
    """Compare the time left of a timer."""
    if not expected - _EARLY <= found <= expected + _LATE:
        raise AssertionError(f"time left: {found:.3f}, not {expected:.3f}")


def _spec(interval: float, value: float) -> ctypes.Array[ctypes.c_char]:
    parts = [int(x) for seconds in (interval, value) for x in (seconds, seconds % 1 * 1e9)]
    return ctypes.create_string_buffer(struct.pack("qqqq", *parts), 32)


@kind
def clocks() -> Iterator[None]:
    """None of them jumps, and what the vDSO says is what the kernel says."""
    numbers = {"monotonic": 1, "raw": 4, "coarse": 6, "boottime": 7}
    before = {name: time.clock_gettime(number) for name, number in numbers.items()}
    wall = time.time()
    while True:
        yield
        now, wall_now = {name: time.clock_gettime(number) for name, number in numbers.items()}, time.time()
        for name in numbers:
            passed = now[name] - before[name]
            if not max(-0.01, wall_now - wall - _LATE) <= passed <= wall_now - wall + _APART:
                raise AssertionError(f"{name} went on by {passed:.3f} s in {wall_now - wall:.3f} s")
        near(now["monotonic"] - before["monotonic"], now["boottime"] - before["boottime"], _APART, "boottime")
        buffer = ctypes.create_string_buffer(16)
        for name, number in numbers.items():
            call("syscall", 228, number, buffer)
            seconds, nanoseconds = struct.unpack("qq", buffer.raw)
            near(time.clock_gettime(number), seconds + nanoseconds / 1e9, _APART, f"{name}: vDSO and kernel")
        before, wall = now, wall_now


@kind
def timerfd() -> Iterator[None]:
    """A periodic one, none of whose expirations is lost or doubled, and one that is far from expiring."""
    fd, far = (make("timerfd_create", 1, os.O_NONBLOCK) for _ in range(2))
    period = 0.1
    begun = time.monotonic()
    call("timerfd_settime", fd, 0, _spec(period, period), None)
    call("timerfd_settime", far, 0, _spec(0, 1000), None)
    count = 0
    while True:
        yield
        select.select([fd], [], [], 1)
        count += struct.unpack("Q", os.read(fd, 8))[0]
        due = (time.monotonic() - begun) / period
        if not due - _LATE / period <= count <= due + 1:
            raise AssertionError(f"{count} expirations, not {due:.1f}")
        equal(bool(select.select([fd], [], [], 1)[0]), True, "goes on")
        left = ctypes.create_string_buffer(32)
        call("timerfd_gettime", far, left)
        seconds, nanoseconds = struct.unpack("qq", left.raw[16:])
        _left(seconds + nanoseconds / 1e9, 1000 - (time.monotonic() - begun))


@kind
def timerfd_absolute() -> Iterator[None]:
    """A deadline on the monotonic clock."""
    fd = make("timerfd_create", 1, os.O_NONBLOCK)
    while True:
        deadline = time.monotonic() + 1000
        call("timerfd_settime", fd, _TIMER_ABSTIME, _spec(0, deadline), None)
        yield
        left = ctypes.create_string_buffer(32)
        call("timerfd_gettime", fd, left)
        seconds, nanoseconds = struct.unpack("qq", left.raw[16:])
        _left(seconds + nanoseconds / 1e9, deadline - time.monotonic())


@kind
def timerfd_wall_clock() -> Iterator[None]:
    """A deadline on the wall clock, to which the time without a host counts."""
    fd = make("timerfd_create", 0, os.O_NONBLOCK)
    while True:
        deadline = time.time() + 1000
        call("timerfd_settime", fd, _TIMER_ABSTIME, _spec(0, deadline), None)
        yield
        left = ctypes.create_string_buffer(32)
        earlier = time.time()
        call("timerfd_gettime", fd, left)
        later = time.time()
        seconds, nanoseconds = struct.unpack("qq", left.raw[16:])
        if not deadline - later - 0.05 <= seconds + nanoseconds / 1e9 <= deadline - earlier + 0.05:
            raise AssertionError(f"time left: {seconds} s, not {deadline - later:.3f}")


@kind
def timerfd_never() -> Iterator[None]:
    """What systemd asks for to learn that the wall clock was set: a time as late as can be, and one within its life."""
    fds = [make("timerfd_create", 0, os.O_NONBLOCK) for _ in range(2)]
    for fd, deadline in zip(fds, ((1 << 63) - 1, 5_000_000_000), strict=True):  # the end of time, and the year 2128
        spec = ctypes.create_string_buffer(struct.pack("qqqq", 0, 0, deadline, 0), 32)
        call("timerfd_settime", fd, _TIMER_ABSTIME | _CANCEL_ON_SET, spec, None)

    def look() -> list[tuple[str, int]]:
        found = []
        for fd in fds:
            fields = dict(line.split(":", 1) for line in open(f"/proc/self/fdinfo/{fd}").read().splitlines())
            seconds = int(fields["it_value"].strip(" ()").partition(",")[0])
            found.append((fields["settime flags"].strip(), seconds + int(time.time())))
        return found

    before = look()
    equal([flags for flags, _ in before], ["03", "03"], "flags")
    while True:
        yield
        for (flags, expires), (_, expected) in zip(look(), before, strict=True):
            equal(flags, "03", "flags")
            near(expires, expected, 3, "when it expires")


@kind
def timerfd_unread() -> Iterator[None]:
    """Expirations that nobody has read."""
    fd = make("timerfd_create", 1, os.O_NONBLOCK)
    while True:
        call("timerfd_settime", fd, 0, _spec(0, 0.001), None)
        select.select([fd], [], [])
        yield
        equal(struct.unpack("Q", os.read(fd, 8))[0], 1, "expirations")


@kind
def posix_timer() -> Iterator[None]:
    """Timers by clock, with a value for their signal, one of them with overruns."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN, signal.SIGRTMIN + 1})
    timers = []
    for number, (interval, value) in enumerate(((0, 1000), (0.01, 0.01))):
        event = ctypes.create_string_buffer(struct.pack("Qii", 0x77 + number, signal.SIGRTMIN + number, 0), 64)
        made = ctypes.c_int()
        make("syscall", 222, 1, event, ctypes.byref(made))
        call("syscall", 223, made.value, 0, _spec(interval, value), None)
        timers.append(made.value)
    begun = time.monotonic()
    while True:
        yield
        left = ctypes.create_string_buffer(32)
        call("syscall", 224, timers[0], left)
        seconds, nanoseconds = struct.unpack("qq", left.raw[16:])
        _left(seconds + nanoseconds / 1e9, 1000 - (time.monotonic() - begun))
        got = signal.sigtimedwait({signal.SIGRTMIN + 1}, 1)
        equal(got is not None, True, "the periodic signal")


@kind
def interval_timer() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2000, 8)
    begun = time.monotonic()
    while True:
        yield
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        _left(left, 1000 - (time.monotonic() - begun))
        equal(interval, 7.0, "the interval")
        left, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        near(left, 2000, 2, "virtual time left")


def _sleep_until() -> None:
    """clock_nanosleep to a time of the monotonic clock."""
    deadline = time.monotonic() + _SLEEP
    moment = ctypes.create_string_buffer(struct.pack("qq", int(deadline), int(deadline % 1 * 1e9)))
    while call("clock_nanosleep", 1, _TIMER_ABSTIME, moment, None):
        pass


def _wait_condition() -> None:
    condition = threading.Condition()
    with condition:
        condition.wait(_SLEEP)


_WAITS: dict[str, Callable[[], object]] = {
    "sleep": lambda: time.sleep(_SLEEP),
    "clock_nanosleep": _sleep_until,
    "select": lambda: select.select([os.pipe()[0]], [], [], _SLEEP),
    "poll": lambda: select.poll().poll(_SLEEP * 1000),
    "epoll": lambda: select.epoll().poll(_SLEEP),
    "futex": _wait_condition,
    "sigtimedwait": lambda: signal.sigtimedwait({signal.SIGUSR2}, _SLEEP),
}


def _wait(name: str, waited: dict[str, float]) -> None:
    before = time.monotonic()
    _WAITS[name]()
    waited[name] = time.monotonic() - before


@kind
def sleeping() -> Iterator[None]:
    """A wait with a time-out that the move falls into ends when it should."""
    while True:
        waited: dict[str, float] = {}
        threads = [threading.Thread(target=_wait, args=(name, waited), daemon=True) for name in _WAITS]
        deadline = time.monotonic() + _SLEEP + _LATE
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))
        equal(sorted(waited), sorted(_WAITS), "waits that ended")
        for name, seconds in waited.items():
            if not _SLEEP - _EARLY <= seconds <= _SLEEP + _LATE:
                raise AssertionError(f"{name}: {seconds:.3f} s, not {_SLEEP}")


@kind
def cpu_clock() -> Iterator[None]:
    """What a process has used of the processor (CRIU does not carry it)."""
    while time.process_time() < 0.3:
        pass
    while True:
        used = time.process_time()
        yield
        if time.process_time() < used - 0.1:
            raise AssertionError(f"fell from {used:.2f} s to {time.process_time():.2f} s")
