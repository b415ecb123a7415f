"""Track a restless program (tests/system/memory/restless.c), and compare what was read of its memory with what it is.

    python mirror.py PROGRAM soft-dirty|userfaultfd SEED MIB THREADS ROUNDS

It writes one line of JSON (Found). This file needs nothing but the package `migrate`.
"""

import ctypes
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from migrate.memory import address_space, layout, pagemap
from migrate.memory.injector import Injector
from migrate.memory.layout import PAGE, Range
from migrate.memory.soft_dirty import SoftDirty
from migrate.memory.tracker import Tracker
from migrate.memory.write_protection import WriteProtection

TIMEOUT = 120.0  # seconds
ROUND = 0.05  # seconds that the program has for itself after each scan


@dataclasses.dataclass
class Found:
    """Pages that exist in the end, those never read, those that are wrong; the bytes that each scan has reported."""

    pages: int
    unread: int
    wrong: list[str]
    written: list[int]


def track(kind: str, pid: int) -> Tracker:
    if kind == "soft-dirty":
        return SoftDirty(pid, pid)
    with Injector() as injector:
        return WriteProtection(pid, injector)


def follow(pid: int, kind: str, rounds: int) -> Found:
    """Keep a mirror of the memory of a process, as pre-copy does; stop the process in the end, and compare."""
    tracker, memory = track(kind, pid), address_space.open_memory(pid)
    mirror: dict[int, bytes] = {}
    written = []
    for _ in range(rounds):
        ranges = tracker.scan()
        written.append(layout.size(ranges))
        copy(memory, ranges, mirror)
        time.sleep(ROUND)
    stop(pid)
    ranges = tracker.written()
    written.append(layout.size(ranges))
    copy(memory, ranges, mirror)
    truth: dict[int, bytes] = {}
    copy(memory, existing(pid), truth)
    wrong = [f"{at:#x}" for at, data in truth.items() if mirror.get(at, data) != data]
    tracker.close()
    return Found(len(truth), len(truth.keys() - mirror.keys()), wrong, written)


def copy(memory: int, ranges: list[Range], pages: dict[int, bytes]) -> None:
    for start, end in ranges:
        for at in range(start, end, PAGE):
            pages.pop(at, None)
            try:
                pages[at] = os.pread(memory, PAGE, at)
            except OSError:
                continue  # it was unmapped


def stop(pid: int) -> None:
    """Stop all threads."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + TIMEOUT
    while any(state(f"/proc/{pid}/task/{task}") != "T" for task in os.listdir(f"/proc/{pid}/task")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(task: str) -> str:
    return Path(task, "stat").read_text().rpartition(")")[2].split()[0]


def existing(pid: int) -> list[Range]:
    """Return the pages that CRIU would dump: those that exist, without the kernel's page of zeros."""
    parts = pagemap.buffers(layout.unite(address_space.anonymous(pid)))
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        pagemap.fill(file.fileno(), parts)
    zeros = page_of_zeros()
    return [
        (start, start + PAGE)
        for address, buffer in parts
        for start, (entry,) in zip(range(address, 1 << 63, PAGE), struct.iter_unpack("=Q", buffer), strict=False)
        if entry >> 62 and entry & pagemap.FRAME != zeros
    ]


def page_of_zeros() -> int:
    """Return the page frame of the page of zeros, which is mapped where memory is read before it is written."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_ulong(PAGE), 3, 0x22, -1, ctypes.c_long(0))
    assert ctypes.string_at(at, 1) == b"\0"
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        return int(struct.unpack("=Q", os.pread(file.fileno(), 8, at // PAGE * 8))[0]) & pagemap.FRAME


def main(program: str, kind: str, seed: str, mebibytes: str, threads: str, rounds: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        process = subprocess.Popen([program, log, seed, mebibytes, threads], start_new_session=True)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (log.exists() and log.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            found = follow(process.pid, kind, int(rounds))
            assert process.poll() is None, log.read_text()[-1000:]
            print(json.dumps(dataclasses.asdict(found)))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
