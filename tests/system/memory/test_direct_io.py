"""A slow disk writes the memory of a program while that is tracked."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.memory import address_space, direct_io, soft_dirty, write_protection
from migrate.memory.layout import PAGE
from tests.support import mirror
from tests.system.memory.lazy_restore import compiled, kill, wait_for

BLKIO = Path("/sys/fs/cgroup/blkio")
RATE = 30_000_000  # bytes per second
ROUNDS = 4
MOST = 16 << 20  # bytes that are read right after a scan
SUPPORT = {"userfaultfd": write_protection.support, "soft-dirty": soft_dirty.support}


@contextlib.contextmanager
def slow_reader(directory: Path) -> Iterator[int]:
    """The program, whose reads take long: the pid."""
    program, log = compiled("direct", directory), directory / "log"
    group = BLKIO / f"pymigrate-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        device = os.stat(place).st_dev
        group.mkdir()
        try:
            process = subprocess.Popen([program, log, Path(place, "data")])
            try:
                wait_for(lambda: log.exists() and log.read_text(), "the program has made its file")
                (group / "cgroup.procs").write_text(str(process.pid))
                limit = f"{os.major(device)}:{os.minor(device)} {RATE}"
                (group / "blkio.throttle.read_bps_device").write_text(limit)
                yield process.pid
            finally:
                process.kill()
                process.wait()
        finally:
            wait_for(lambda: not (group / "cgroup.procs").read_text(), "the program has left its cgroup")
            group.rmdir()


@pytest.mark.skipif(not BLKIO.exists(), reason="no blkio cgroup of version 1")
@pytest.mark.parametrize("kind", SUPPORT)
def test_what_a_device_writes_is_not_missed(kind: str, tmp_path: Path) -> None:
    if problem := SUPPORT[kind]():
        pytest.skip(problem)
    with slow_reader(tmp_path) as pid:
        assert direct_io.is_used(pid)
        assert not direct_io.is_asynchronous(pid)
        tracker, memory = mirror.track(kind, pid), address_space.open_memory(pid)
        try:
            tracker.scan()
            for _ in range(ROUNDS):
                time.sleep(0.1)
                seen: dict[int, bytes] = {}
                for start, end in tracker.scan():
                    if len(seen) < MOST // PAGE:
                        data = os.pread(memory, min(end - start, MOST), start)
                        seen |= {start + at: data[at : at + PAGE] for at in range(0, len(data), PAGE)}
                time.sleep(0.15)
                mirror.stop(pid)
                again = {at for start, end in tracker.written() for at in range(start, end, PAGE)}
                assert [at for at in seen.keys() - again if os.pread(memory, PAGE, at) != seen[at]] == []
                os.kill(pid, signal.SIGCONT)
        finally:
            tracker.close()
            os.close(memory)


def test_asynchronous_reads(tmp_path: Path) -> None:
    """io_setup(2) alone is harmless: without O_DIRECT its reads are done when it returns."""
    text = f"""
import ctypes, os, sys
if "ring" in sys.argv: assert not ctypes.CDLL(None).syscall(206, 8, ctypes.byref(ctypes.c_ulong()))
if "direct" in sys.argv: os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
print(os.getpid(), flush=True)
input()
"""
    for words, expected in {
        ("ring",): (False, False),
        ("direct",): (True, False),
        ("ring", "direct"): (True, True),
    }.items():
        argv = ["python3", "-c", text, *words]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                assert (direct_io.is_used(process.pid), direct_io.is_asynchronous(process.pid)) == expected
            finally:
                kill(process.pid)
