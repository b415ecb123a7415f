"""A program that is dumped by CRIU, whose memory goes into a store, and that is restored lazily by a page handler."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from criu_rpc import pagemap
from migrate.memory import layout
from migrate.memory.handler import PageHandler
from migrate.memory.layout import PAGE
from migrate.memory.store import Quota, Store
from runtime.linux import processes
from runtime.state import lazy

CRIU = next(path for path in ("/opt/pymigrate/sbin/criu", "/usr/sbin/criu") if os.path.exists(path))
HERE = Path(__file__).parent


def compiled(name: str, directory: Path) -> Path:
    """Compile a program of this directory."""
    program = directory / name
    subprocess.run(["gcc", "-O2", "-o", program, HERE / f"{name}.c", "-lpthread"], check=True, timeout=60)
    return program


def wait_for(holds: Callable[[], object], what: str, timeout: float = 30) -> None:
    """Poll until something holds; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def fill_store(images: Path) -> int:
    """Make the store from the lazy pages of a complete dump, and take them out of the images; return their bytes."""
    store = Store(images, Quota(1 << 40))
    directory = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    total = 0
    try:
        for name, space in pagemap.names(directory):
            found = pagemap.read(directory, name)
            path = images / f"pages-{found.pages_id}.img"
            data, kept, entries = memoryview(path.read_bytes()), bytearray(), []
            at = 0
            for entry in found.entries:
                assert entry.flags & pagemap.PRESENT
                size = entry.pages * PAGE
                if not entry.flags & pagemap.LAZY:
                    kept += data[at : at + size]
                    entries.append(entry)
                else:
                    start = entry.address
                    for address, pages in layout.split([(start, start + size)]):
                        piece = data[at + address - start : at + address - start + pages * PAGE]
                        is_zero = bytes(piece) == bytes(len(piece))
                        words = [layout.word(address, pages, zero=is_zero)]
                        store.add(layout.head(space, words) + (b"" if is_zero else piece))
                    total += size
                    entries.append(entry._replace(flags=pagemap.LAZY))
                at += size
            data.release()
            path.write_bytes(kept)
            pagemap.write(directory, name, found._replace(entries=entries))
        store.finish()
    finally:
        os.close(directory)
        store.close()
    return total


def group_of(group: int) -> list[int]:
    """Return the processes of a process group that live, oldest first."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append((int(fields[19]), int(name)))
    return [pid for _, pid in sorted(found)]


def kill(pid: int, timeout: float = 10) -> None:
    """Kill a process, and wait until it has exited."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert processes.wait_exit(pidfd, timeout)
        finally:
            os.close(pidfd)


class Program:
    """The program, its images, and the page handler. `log` is what it writes."""

    def __init__(self, directory: Path, program: Path, *arguments: object) -> None:
        self.directory, self.log, self.images = directory, directory / "log", directory / "images"
        self.note, self.work = directory / lazy.NOTE, directory / "work"
        self.images.mkdir()
        self.work.mkdir()
        null = subprocess.DEVNULL
        self._started = subprocess.Popen(
            ["unshare", "--pid", "--fork", "setsid", program, self.log, *map(str, arguments)],
            stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/",
        )  # fmt: skip
        self.handler: PageHandler | None = None
        wait_for(lambda: self.lines("ready"), "the program is not ready")
        (self.pid,) = processes.children(self._started.pid, processes.start_time(self._started.pid))

    def lines(self, word: str) -> list[list[str]]:
        """Return the fields of those lines of the log that begin with a word."""
        try:
            lines = self.log.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [line.split() for line in lines if line.startswith(word) and line.endswith("\n")]

    def dump(self) -> int:
        """Dump and kill it, and make the store; return the bytes in it."""
        self._criu("dump", "-t", self.pid)
        self._started.wait(10)
        self._logged = self.log.stat().st_size
        size = fill_store(self.images)
        assert size, (
            sorted(os.listdir(self.images)),
            self.log.read_text(),
            (self.work / "dump.log").read_text()[-9000:],
        )
        return size

    def restore(self) -> PageHandler:
        """Restore it lazily; the page handler is not told that it runs."""
        self.handler = handler = PageHandler.start(self.images, self.note, self.work)
        handler.await_ready()
        handler.load()
        handler.await_loaded()
        pidfile = self.directory / "pid"
        pidfile.unlink(missing_ok=True)
        os.truncate(self.log, self._logged)  # an earlier restore may have written
        self._criu("restore", "-d", "--lazy-pages", "--pidfile", pidfile)
        self.pid = int(pidfile.read_text())
        return handler

    def _criu(self, verb: str, *more: object) -> None:
        command = [CRIU, verb, "-D", self.images, "-W", self.work, "-o", f"{verb}.log", "-v4", *map(str, more)]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, (self.work / f"{verb}.log").read_text()[-3000:]

    @property
    def handlers(self) -> list[int]:
        """The page handler's processes."""
        found = lazy.read(str(self.note))
        return group_of(found.group) if found is not None and found.group else []

    def is_whole(self) -> bool:
        """Return whether all memory is in place."""
        found = lazy.read(str(self.note))
        assert found is None or not found.is_damaged
        return found is None

    def sweep(self) -> list[str]:
        """Let it check everything; return the line that says the result."""
        before = len(self.lines("swept"))
        os.kill(self.pid, signal.SIGUSR1)
        wait_for(lambda: len(self.lines("swept")) > before, "it does not check its memory")
        return self.lines("swept")[-1]

    def close(self) -> None:
        """Kill everything."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # with it the kernel kills everything in its pid namespace
        if self._started.returncode is None:
            self._started.wait(10)
        if self.handler is not None:
            self.handler.await_end()


@contextlib.contextmanager
def program(directory: Path, name: str, *arguments: object) -> Iterator[Program]:
    """Compile and start a program; kill everything at the end."""
    running = Program(directory, compiled(name, directory), *arguments)
    try:
        yield running
    finally:
        running.close()
