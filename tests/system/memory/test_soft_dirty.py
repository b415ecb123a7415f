"""Stop a process for a moment; and what the soft-dirty tracker finds without the bits, which few kernels have."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.memory import stopping
from migrate.memory.layout import PAGE, Range
from migrate.memory.soft_dirty import SoftDirty
from migrate.memory.stopping import StopFailed, Stopped
from migrate.memory.tracking import TrackingFailed
from runtime.linux import processes

HUGE = 2 << 20
TIMEOUT = 10.0
# A program that does one line of Python at a time. `spin` lets many threads count in shared memory.
PROGRAM = f"""
import ctypes, mmap, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
for name in ("mmap", "mremap"):
    getattr(libc, name).restype = ctypes.c_void_p
    getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_ulong, *[ctypes.c_long] * 4][:6 if name == "mmap" else 5]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int]
def new(size):
    at = libc.mmap(None, size + {HUGE}, 3, 0x22, -1, 0)
    at = -(-at // {HUGE}) * {HUGE}
    libc.madvise(at, size, 15)
    return at
def fill(at, size):
    ctypes.memset(at, 1, size)
    return at
def spin(number):
    def count(cell):
        while True:
            cells[cell] += 1
    global cells
    cells = (ctypes.c_ulong * number).from_buffer(mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 8 * number))
    for cell in range(number):
        threading.Thread(target=count, args=(cell,), daemon=True).start()
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Program:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.pid = process, process.pid

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> str:
        self.send(line)
        return self.line()


@contextlib.contextmanager
def program(*argv: object) -> Iterator[Program]:
    argv = (sys.executable, "-I", "-c", PROGRAM, *map(str, argv))
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Program(process)
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.fixture
def counters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Callable[[], bytes]]]:
    """A program of ten threads that count, and what they have counted."""
    file = tmp_path_factory.mktemp("counters") / "cells"
    file.write_bytes(bytes(80))
    with program(file) as found:
        found.do("spin(10)")
        wait_for(lambda: any(file.read_bytes()))
        yield found, file.read_bytes


def test_all_threads_stand_still(counters: tuple[Program, Callable[[], bytes]]) -> None:
    program, counted = counters

    def look() -> None:
        with Stopped(program.pid, TIMEOUT):
            tasks = os.listdir(f"/proc/{program.pid}/task")
            assert len(tasks) == 11
            assert {state(int(task)) for task in tasks} == {"t"}
            before = counted()
            time.sleep(0.05)  # in which nothing may happen
            assert counted() == before

    stopping.apart(look)
    before = counted()
    wait_for(lambda: counted() != before)


def test_a_killed_tracer_leaves_nothing_stopped(counters: tuple[Program, Callable[[], bytes]]) -> None:
    program, counted = counters
    tracer = os.fork()
    if not tracer:
        with contextlib.suppress(BaseException), Stopped(program.pid, TIMEOUT):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitpid(tracer, 0)[1] == signal.SIGKILL
    before = counted()
    wait_for(lambda: counted() != before)


def test_a_parent_in_vfork_does_not_stop_and_runs_on(tmp_path: Path) -> None:
    """It is released although it could not be stopped in time. Its child waits for a fifo before it executes."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with program() as parent:
        parent.send(f"os.posix_spawn('/bin/true', ['true'], {{}}, file_actions=[(0, 9, {str(fifo)!r}, 0, 0)])")
        wait_for(lambda: len(processes.descendants(parent.pid)) > 1 and state(parent.pid) == "D")
        with pytest.raises(StopFailed):
            stopping.apart(lambda: Stopped(parent.pid, 0.05).__enter__())
        with fifo.open("w"):
            pass
        assert parent.line().isdigit()
        assert parent.do("'on'") == "on"


def covers(ranges: list[Range], start: int, size: int) -> bool:
    return any(begin <= start and start + size <= end for begin, end in ranges)


def touches(ranges: list[Range], start: int, size: int) -> bool:
    return any(begin < start + size and start < end for begin, end in ranges)


@contextlib.contextmanager
def tracked() -> Iterator[tuple[Program, SoftDirty]]:
    with program() as found, contextlib.closing(SoftDirty(found.pid, found.pid)) as tracker:
        yield found, tracker


def test_pages_that_appear_and_stay() -> None:
    with tracked() as (process, tracker):
        at = int(process.do(f"fill(new({HUGE * 3}), {HUGE})"))
        found = tracker.scan()
        assert covers(found, at, HUGE)
        assert not touches(found, at + HUGE, 2 * HUGE)
        assert not touches(tracker.scan(), at, HUGE)
        process.do(f"fill({at + HUGE + 5 * PAGE}, {PAGE})")
        assert covers(tracker.written(), at + HUGE + 5 * PAGE, PAGE)
        found = tracker.scan()
        assert covers(found, at + HUGE + 5 * PAGE, PAGE)
        assert not touches(found, at, HUGE)
        assert not touches(tracker.written(), at, 3 * HUGE)


def test_page_tables_that_are_moved_count_as_written() -> None:
    """mremap(2) moves 2 MiB without a look at the pages: soft-dirty bits come along as they are."""
    with tracked() as (process, tracker):
        at, other = (int(process.do(f"fill(new({HUGE}), {HUGE})")) for _ in range(2))
        for _ in range(2):
            tracker.scan()
        assert not touches(tracker.scan(), at, HUGE)
        assert int(process.do(f"libc.mremap({other}, {HUGE}, {HUGE}, 3, {at})")) == at
        assert covers(tracker.written(), at, HUGE)
        assert covers(tracker.scan(), at, HUGE)


def test_who_tracks_itself_is_not_tracked() -> None:
    """Clearing the bits would take them from it."""
    with program() as process:
        process.do("open('/proc/self/pagemap').fileno()")
        process.do("globals().update(kept=open('/proc/self/clear_refs', 'w'))")
        with pytest.raises(TrackingFailed, match="itself"):
            SoftDirty(process.pid, process.pid)


def test_who_begins_to_track_itself_has_everything_reported() -> None:
    with tracked() as (process, tracker):
        at = int(process.do(f"fill(new({HUGE}), {HUGE})"))
        tracker.scan()
        process.do("globals().update(kept=open('/proc/self/clear_refs', 'w'))")
        for _ in range(2):
            assert covers(tracker.scan(), at, HUGE)
        assert covers(tracker.written(), at, HUGE)


def test_shared_address_spaces_are_seen() -> None:
    """clone(CLONE_VM | SIGCHLD) makes a process that writes the same memory."""
    with tracked() as (process, tracker):
        assert not tracker._shares()
        process.do(
            "globals().update(stop=ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(('pause', libc)), "
            f"stack=new({HUGE}))"
        )
        child = process.do(f"libc.clone(stop, ctypes.c_void_p(stack + {HUGE}), 0x100 | 17, None)")
        try:
            assert int(child) > 0
            assert tracker._shares()
        finally:
            os.kill(int(child), signal.SIGKILL)
