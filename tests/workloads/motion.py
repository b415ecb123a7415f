"""Memory that is in motion during a move: written, mapped, unmapped, moved, discarded, forked, and left by execve(2).

Processes do that all the time and check what they read, so that a page that is lost, stale or zero shows wherever the
move is. Each page that was written has the same value in its first and its last word, by region, page and generation.
"""

import ctypes
import mmap
import os
import random
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from harness import call, child, kind, libc, make, say_ready

_PAGE = 4096
_REGIONS, _LARGEST = 24, 256  # pages
_MREMAP_MAYMOVE, _MADV_DONTNEED, _MADV_REMOVE = 1, 4, 9
_PROCESSES = 4
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
_AFTER_EXEC = """
import ctypes, mmap, time
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 1 << 20, 4096):
    memory[at:at + 8] = at.to_bytes(8, "little")
end = time.monotonic() + 0.3
while time.monotonic() < end:
    for at in range(0, 1 << 20, 4096):
        if memory[at:at + 8] != at.to_bytes(8, "little"):
            raise SystemExit(3)
"""


@dataclass
class Region:
    """An anonymous private mapping. A page of generation 0 was never written, or was discarded: it is zero."""

    number: int
    address: int
    generations: list[int] = field(default_factory=list)

    @classmethod
    def new(cls, number: int, pages: int) -> "Region":
        address = libc.mmap(None, pages * _PAGE, 3, 0x22, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError("mmap")
        return cls(number, address, [0] * pages)

    def words(self, page: int) -> tuple[ctypes.c_uint64, ctypes.c_uint64]:
        at = self.address + page * _PAGE
        return ctypes.c_uint64.from_address(at), ctypes.c_uint64.from_address(at + _PAGE - 8)

    def value(self, page: int) -> int:
        generation = self.generations[page]
        return (self.number << 40 | page << 24 | generation & 0xFFFFFF) if generation else 0

    def write(self, page: int) -> None:
        self.generations[page] += 1
        for word in self.words(page):
            word.value = self.value(page)

    def check(self, page: int) -> None:
        found, expected = [word.value for word in self.words(page)], self.value(page)
        if found != [expected] * 2:
            raise AssertionError(f"region {self.number}, page {page}: {found!r}, not {expected:#x}")

    def check_all(self) -> None:
        for page in range(len(self.generations)):
            self.check(page)

    def grow(self, pages: int) -> None:
        """To `pages` pages, wherever there is room."""
        old = len(self.generations)
        address = libc.mremap(self.address, old * _PAGE, pages * _PAGE, _MREMAP_MAYMOVE)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError("mremap")
        self.address = address
        self.generations = (self.generations + [0] * pages)[:pages]

    def discard(self, first: int, count: int) -> None:
        call("madvise", ctypes.c_void_p(self.address + first * _PAGE), ctypes.c_size_t(count * _PAGE), _MADV_DONTNEED)
        self.generations[first : first + count] = [0] * count

    def unmap(self) -> None:
        call("munmap", ctypes.c_void_p(self.address), ctypes.c_size_t(len(self.generations) * _PAGE))


class Motion:
    """One process that keeps its regions in motion."""

    def __init__(self, seed: int) -> None:
        self.random, self.number = random.Random(seed), seed * 1000
        self.regions: list[Region] = []
        self.children: list[int] = []

    def step(self) -> None:
        action = self.random.choices(
            (self.write, self.check, self.add, self.drop, self.resize, self.discard, self.fork, self.execute),
            (40, 40, 6, 4, 6, 4, 1, 0.3),
        )[0]
        action()
        for pid in list(self.children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.children.remove(pid)
                if status:
                    raise AssertionError(f"a child has found wrong memory (status {status:#x})")

    def pick(self) -> Region:
        if not self.regions:
            self.add()
        return self.random.choice(self.regions)

    def write(self) -> None:
        region = self.pick()
        for _ in range(16):
            region.write(self.random.randrange(len(region.generations)))

    def check(self) -> None:
        region = self.pick()
        for _ in range(16):
            region.check(self.random.randrange(len(region.generations)))

    def add(self) -> None:
        if len(self.regions) < _REGIONS:
            self.number += 1
            self.regions.append(Region.new(self.number, self.random.randint(1, _LARGEST)))

    def drop(self) -> None:
        region = self.pick()
        region.check_all()
        region.unmap()
        self.regions.remove(region)

    def resize(self) -> None:
        self.pick().grow(self.random.randint(1, _LARGEST))

    def discard(self) -> None:
        region = self.pick()
        first = self.random.randrange(len(region.generations))
        region.discard(first, self.random.randint(1, len(region.generations) - first))

    def fork(self) -> None:
        """A child has a copy of all, goes on with that for a while, and ends."""
        if len(self.children) < 2:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    self.children = []
                    self.random.seed(os.getpid())
                    end = time.monotonic() + self.random.uniform(0, 0.5)
                    while time.monotonic() < end:
                        self.random.choice((self.write, self.check, self.resize, self.discard))()
                    for region in self.regions:
                        region.check_all()
                    code = 0
                except BaseException as error:
                    os.write(2, f"{error!r}\n".encode())
                os._exit(code)
            self.children.append(pid)

    def execute(self) -> None:
        if len(self.children) < 2:
            pid = os.fork()
            if pid == 0:
                os.execv("/usr/bin/python3", ["python3", "-I", "-S", "-c", _AFTER_EXEC])
            self.children.append(pid)


def _move(seed: int) -> None:
    """Run until something is wrong; a second thread only reads and writes a region of its own."""
    motion = Motion(seed)
    for _ in range(50):
        motion.step()
    own = Region.new(seed, _LARGEST)
    failures: list[BaseException] = []

    def beside() -> None:
        try:
            while True:
                for page in range(_LARGEST):
                    own.write(page)
                    own.check((page + 1) % _LARGEST)
                time.sleep(0.001)
        except BaseException as error:
            failures.append(error)

    threading.Thread(target=beside, daemon=True).start()
    say_ready()
    while True:
        motion.step()
        if failures:
            raise failures[0]
        time.sleep(0.0005)


@kind
def memory_in_motion() -> Iterator[None]:
    pids = [child(lambda seed=seed: _move(seed)) for seed in range(1, _PROCESSES + 1)]
    while True:
        yield
        for pid in pids:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                raise AssertionError(f"process {pid} has found wrong memory (status {status:#x})")


class Shared:
    """An object of shared memory. Of each 16 pages the last four were never written, and one in 32 is written again."""

    def __init__(self, number: int, size: int, memory: memoryview, fd: int = -1) -> None:
        """`memory`: all of it, mapped. `fd`: a descriptor, if it has one."""
        self.number, self.memory, self.fd, self.pages = number, memory, fd, size // _PAGE
        self.generations = [0] * self.pages
        self.hot = range(0, self.pages, 32)

    def content(self, page: int) -> bytes:
        generation = self.generations[page]
        word = self.number << 48 | page << 24 | generation if generation else 0
        return word.to_bytes(8, "little") * (_PAGE // 8)

    def write(self, pages: list[int]) -> None:
        """Half of the time through the descriptor."""
        for place, page in enumerate(pages):
            self.generations[page] += 1
            if self.fd >= 0 and place % 2:
                os.pwrite(self.fd, self.content(page), page * _PAGE)
            else:
                self.memory[page * _PAGE : (page + 1) * _PAGE] = self.content(page)

    def discard(self, page: int) -> None:
        """Free a page, which is zero after that."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        call("madvise", ctypes.c_void_p(address + page * _PAGE), ctypes.c_size_t(_PAGE), _MADV_REMOVE)
        self.generations[page] = 0

    def check(self) -> None:
        for page in range(self.pages):
            if bytes(self.memory[page * _PAGE : (page + 1) * _PAGE]) != self.content(page):
                raise AssertionError(f"object {self.number}, page {page} is not what was written last")


def _shared(number: int, size: int) -> Shared:
    """Anonymous memory, a memfd, or a System V segment."""
    if number == 1:
        return Shared(number, size, memoryview(mmap.mmap(-1, size)))
    if number == 2:
        fd = os.memfd_create("in-motion")
        os.ftruncate(fd, size)
        return Shared(number, size, memoryview(mmap.mmap(fd, size)), fd)
    segment = make("shmget", 0, size, 0o1600)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    return Shared(number, size, memoryview((ctypes.c_char * size).from_address(address)).cast("B"))


@kind
def shared_memory_in_motion() -> Iterator[None]:
    """Children write to it and exit, and take their page tables along; what they have written stays."""
    sizes = (41 << 20) + 3 * _PAGE, (5 << 20) + _PAGE, 2 << 20
    objects = [_shared(number, size) for number, size in enumerate(sizes, 1)]
    for item in objects:
        item.write([page for page in range(item.pages) if page % 16 < 12])
    draw = random.Random(1)

    def turn() -> None:
        """A child writes, and nobody else does; the pages are drawn before, so that both know them."""
        item = draw.choice(objects)
        pages = draw.sample(item.hot, 8)
        pid = os.fork()
        if not pid:
            item.write(pages)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise AssertionError("a child could not write")
        for page in pages:
            item.generations[page] += 1
        item.discard(draw.choice(item.hot))

    asked, ask = os.pipe()
    answered, answer = os.pipe()

    def all_the_time() -> None:
        os.close(ask)
        say_ready()
        while True:
            turn()
            if select.select([asked], [], [], 0.005)[0]:
                os.read(asked, 1)
                for item in objects:
                    item.check()
                os.write(answer, b"y")

    child(all_the_time)
    os.close(answer)
    while True:
        yield
        os.write(ask, b"?")
        if not os.read(answered, 1):
            raise AssertionError("shared memory is not what was written")
