"""Mappings, and what was said of them to the kernel."""

import ctypes
import fcntl
import mmap
import os
import signal
from collections.abc import Iterator

from harness import call, child, equal, kind, make, say_ready

_PAGE = 4096


def flags_of(address: int) -> set[str]:
    """The VmFlags of the mapping at an address (proc(5), smaps)."""
    found = False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                found = low <= address < high
            elif found and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError("the mapping is gone")


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@kind
def shared_anonymous() -> Iterator[None]:
    """Memory shared with a child: what one writes the other sees."""
    memory = mmap.mmap(-1, 4 * _PAGE)
    memory[:4] = b"mine"
    reader, writer = os.pipe()
    back_reader, back_writer = os.pipe()

    def answer() -> None:
        say_ready()
        while os.read(reader, 1):
            memory[_PAGE : _PAGE + 6] = b"theirs"
            os.write(back_writer, memory[:4])

    child(answer)
    while True:
        yield
        memory[:4] = b"MINE"
        os.write(writer, b"x")
        equal(os.read(back_reader, 4), b"MINE", "what the child sees")
        equal(memory[_PAGE : _PAGE + 6], b"theirs", "what the child wrote")
        memory[_PAGE : _PAGE + 6] = bytes(6)


@kind
def private_after_fork() -> Iterator[None]:
    """Copy on write: what a child had inherited is its own."""
    memory = mmap.mmap(-1, 64 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:6] = b"before"
    reader, writer = os.pipe()
    back_reader, back_writer = os.pipe()

    def answer() -> None:
        say_ready()
        while os.read(reader, 1):
            os.write(back_writer, memory[:6])

    child(answer)
    while True:
        yield
        memory[:6] = b"later!"
        os.write(writer, b"x")
        equal(os.read(back_reader, 6), b"before", "what the child has")


@kind
def memfd() -> Iterator[None]:
    """Contents, seals, name, and a shared mapping."""
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, b"sealed contents")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    other = os.memfd_create("mapped")
    os.ftruncate(other, 2 * _PAGE)
    memory = mmap.mmap(other, 2 * _PAGE)
    memory[:6] = b"mapped"
    while True:
        yield
        equal(os.pread(fd, 100, 0), b"sealed contents", "contents")
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        equal(fcntl.fcntl(fd, fcntl.F_GET_SEALS), seals, "seals")
        equal(os.readlink(f"/proc/self/fd/{fd}"), "/memfd:sealed (deleted)", "name")
        memory[:6] = b"MAPPED"
        equal(os.pread(other, 6, 0), b"MAPPED", "the mapping")
        memory[:6] = b"mapped"


@kind
def huge_pages() -> Iterator[None]:
    fd = make("memfd_create", ctypes.c_char_p(b"huge"), 4)  # MFD_HUGETLB
    while True:
        yield
        equal(os.readlink(f"/proc/self/fd/{fd}"), "/memfd:huge (deleted)")


@kind
def advice() -> Iterator[None]:
    """What madvise and mlock have said."""
    kinds = {"dd": 16, "dc": 10, "wf": 18, "hg": 14, "nh": 15, "sr": 2, "rr": 1, "mg": 12}
    mapped = {}
    for name, number in kinds.items():
        memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:4] = b"data"
        try:
            call("madvise", address_of(memory), 8 << 20, number)
        except OSError:
            continue  # this kernel has it not
        mapped[name] = memory
    while True:
        yield
        lost = [name for name, memory in mapped.items() if name not in flags_of(address_of(memory))]
        equal(lost, [], "flags that are lost")


@kind
def locked_memory() -> Iterator[None]:
    memory = mmap.mmap(-1, 4 * _PAGE)
    make("mlock", address_of(memory), 4 * _PAGE)
    while True:
        yield
        equal("lo" in flags_of(address_of(memory)), True, "locked")


@kind
def locked_memory_on_fault() -> Iterator[None]:
    memory = mmap.mmap(-1, 4 * _PAGE)
    make("mlock2", address_of(memory), 4 * _PAGE, 1)
    before = flags_of(address_of(memory))
    while True:
        yield
        equal("lo" in flags_of(address_of(memory)), "lo" in before, "locked")


@kind
def mlock_future() -> Iterator[None]:
    """What is mapped later is locked as well."""
    make("mlockall", 2)  # MCL_FUTURE

    while True:
        yield
        memory = mmap.mmap(-1, 4 * _PAGE)
        equal("lo" in flags_of(address_of(memory)), True, "what is mapped later is locked")
        memory.close()


@kind
def protection_keys() -> Iterator[None]:
    key = make("pkey_alloc", 0, 0)
    memory = mmap.mmap(-1, _PAGE)
    make("pkey_mprotect", address_of(memory), _PAGE, 3, key)
    call("pkey_set", key, 2)  # may not be written

    def write() -> None:
        memory[0] = 1

    while True:
        yield
        pid = os.fork()
        if pid == 0:
            write()
            os._exit(0)
        equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGSEGV, "a write")


@kind
def execute_only() -> Iterator[None]:
    """The kernel protects it by a key of its own, where the processor has keys: then it cannot be read."""
    memory = mmap.mmap(-1, _PAGE)
    make("mprotect", address_of(memory), _PAGE, 4)

    def is_read() -> bool:
        pid = os.fork()
        if pid == 0:
            ctypes.string_at(address_of(memory), 1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    before = is_read()
    while True:
        yield
        equal(is_read(), before, "whether it can be read")


@kind
def secret_memory() -> Iterator[None]:
    fd = make("syscall", 447, 0)
    os.ftruncate(fd, _PAGE)
    memory = mmap.mmap(fd, _PAGE)
    memory[:6] = b"secret"
    while True:
        yield
        equal(memory[:6], b"secret")


@kind
def guard_and_growing() -> Iterator[None]:
    """Memory that may not be touched, and a mapping of a file that was deleted."""
    memory = mmap.mmap(-1, 4 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    call("mprotect", address_of(memory) + _PAGE, _PAGE, 0)
    fd = os.open("/tmp/mapped-gone", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * _PAGE)
    private, shared = (mmap.mmap(fd, _PAGE, flags=flag) for flag in (mmap.MAP_PRIVATE, mmap.MAP_SHARED))
    shared[1] = 2
    private[0] = 1
    os.unlink("/tmp/mapped-gone")
    os.close(fd)
    while True:
        yield
        pid = os.fork()
        if pid == 0:
            ctypes.string_at(address_of(memory) + _PAGE, 1)
            os._exit(0)
        equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGSEGV, "the guard")
        equal((private[0], private[1], shared[1]), (1, 2, 2), "what was mapped")
