"""Userfaultfd (ioctl_userfaultfd(2), linux/userfaultfd.h), and the system calls that share descriptors and memory.

Descriptors are plain numbers here: the page handler's two processes share one descriptor table, in which an object's
destructor in one process would close a descriptor of the other.
"""

import contextlib
import ctypes
import enum
import errno
import fcntl
import mmap
import os
import signal
import struct
import sys

PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = range(0x12, 0x17)
EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # the features of the events FORK, REMAP, REMOVE and UNMAP
WRITES = 1 << 15 | 1 << 13 | 1  # the features WP_ASYNC, WP_UNPOPULATED, PAGEFAULT_FLAG_WP
MISSING, WRITE_PROTECT = 1, 2  # the modes of `register`
NUMBER = {"x86_64": 323, "aarch64": 282}  # of the system call
USER_MODE_ONLY = 1
MESSAGE_SIZE = 32

_UNREGISTER, _WAKE, _COPY, _ZEROPAGE = 0x8010AA01, 0x8010AA02, 0xC028AA03, 0xC020AA04
_API, _REGISTER = 0xC018AA3F, 0xC020AA00
_RANGE, _COPYING, _ZEROING, _REGISTERING = (struct.Struct(f"={count}Q") for count in (2, 5, 4, 4))
_MESSAGE = struct.Struct("=B7xQQQ")
_CLONE_FILES = 0x400
_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220}
_MAP_POPULATE = 0x8000

# PyDLL keeps the interpreter's lock: a clone's child must own it.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.syscall.restype = ctypes.c_long


class Outcome(enum.Enum):
    """What became of a copy: the pages before `done` are in place; the next one is not, for this reason."""

    DONE = enum.auto()
    THERE = enum.auto()  # the page exists
    UNREGISTERED = enum.auto()  # not in one registered mapping
    CHANGING = enum.auto()  # events have to be read, or the thread that caused them has not woken yet
    GONE = enum.auto()  # the address space is gone
    NO_MEMORY = enum.auto()


_OUTCOMES = {
    errno.EEXIST: Outcome.THERE, errno.ENOENT: Outcome.UNREGISTERED, errno.EAGAIN: Outcome.CHANGING,
    errno.ESRCH: Outcome.GONE, errno.ENOMEM: Outcome.NO_MEMORY,
}  # fmt: skip


def copy(fd: int, address: int, source: int, size: int) -> tuple[int, Outcome]:
    """UFFDIO_COPY from `source` in this process: return the bytes that are in place, and why not more."""
    return _fill(fd, _COPY, bytearray(_COPYING.pack(address, source, size, 0, 0)), size)


def zero(fd: int, address: int, size: int) -> tuple[int, Outcome]:
    """UFFDIO_ZEROPAGE: return the bytes that are in place, and why not more."""
    return _fill(fd, _ZEROPAGE, bytearray(_ZEROING.pack(address, size, 0, 0)), size)


def _fill(fd: int, request: int, argument: bytearray, size: int) -> tuple[int, Outcome]:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        done = int.from_bytes(argument[-8:], sys.byteorder, signed=True)
        if done > 0:  # the next call tells why it stopped
            return done, Outcome.DONE
        found = _OUTCOMES.get(error.errno or 0)
        if found is None:
            raise
        return 0, found
    return size, Outcome.DONE


def is_quiet(fd: int) -> bool:
    """Return whether every change of the address space that has begun is reported, and its thread has woken.

    A call with an empty range fails with EINVAL then, with EAGAIN otherwise.
    """
    try:
        return zero(fd, 0, 0)[1] is not Outcome.CHANGING
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return True


def wake(fd: int, address: int, size: int) -> None:
    """UFFDIO_WAKE: let threads that wait for these pages try again."""
    with contextlib.suppress(OSError):  # the process is gone
        fcntl.ioctl(fd, _WAKE, _RANGE.pack(address, size))


def wake_all(fd: int) -> None:
    """Let all threads that wait for any page try again."""
    with open("/proc/sys/vm/mmap_min_addr") as file:
        start = max(int(file.read()) + mmap.PAGESIZE - 1 & -mmap.PAGESIZE, mmap.PAGESIZE)
    # The kernel rejects ranges beyond the top of an address space, which the processor and the kernel decide.
    for top in (1 << bits for bits in range(57, 37, -1)):
        for end in (top, top - mmap.PAGESIZE):
            try:
                fcntl.ioctl(fd, _WAKE, _RANGE.pack(start, end - start))
            except OSError:
                continue
            return


def create(flags: int = 0) -> int:
    """userfaultfd(2): return one of this process, which does not block. Raises OSError."""
    number = NUMBER.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"userfaultfd on {os.uname().machine}")
    fd = _libc.syscall(ctypes.c_long(number), ctypes.c_long(os.O_CLOEXEC | os.O_NONBLOCK | flags))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "userfaultfd")
    return int(fd)


def enable(fd: int, features: int) -> None:
    """UFFDIO_API. Raises OSError."""
    fcntl.ioctl(fd, _API, bytearray(struct.pack("=3Q", 0xAA, features, 0)))


def register(fd: int, start: int, end: int, mode: int) -> None:
    """UFFDIO_REGISTER. Raises OSError."""
    fcntl.ioctl(fd, _REGISTER, bytearray(_REGISTERING.pack(start, end - start, mode, 0)))


def unregister(fd: int, start: int, end: int) -> None:
    """UFFDIO_UNREGISTER. Raises OSError."""
    fcntl.ioctl(fd, _UNREGISTER, _RANGE.pack(start, end - start))


def parse(message: bytes | memoryview) -> tuple[int, int, int, int]:
    """Return the event of a struct uffd_msg, and its arguments.

    PAGEFAULT: flags, address. FORK: the new descriptor. REMAP: from, to, length. REMOVE and UNMAP: start, end.
    """
    event, first, second, third = _MESSAGE.unpack(message)
    return event, first & 0xFFFFFFFF if event == FORK else first, second, third


def message(event: int, *arguments: int) -> bytes:
    """Return a struct uffd_msg."""
    return _MESSAGE.pack(event, *(*arguments, 0, 0, 0)[:3])


def map_shared(fd: int, size: int) -> int:
    """mmap(2) a file, or new shared memory if `fd` is -1, with its pages: return the address. Raises OSError."""
    flags = mmap.MAP_SHARED | _MAP_POPULATE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    found = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mmap")
    return int(found)


def unmap(address: int, size: int) -> None:
    """munmap(2)"""
    _libc.munmap(address, size)


def lock(address: int, size: int) -> None:
    """mlock(2), as far as it is permitted: the kernel cannot fail to write into what cannot be swapped out."""
    _libc.mlock(address, size)


def view(address: int, size: int) -> memoryview:
    """Return mapped memory as bytes that can be changed."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def address_of(buffer: memoryview | mmap.mmap) -> int:
    """Return the address of a buffer that can be changed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def clone() -> int:
    """clone(2): fork a process that shares this one's descriptor table. For processes with one thread.

    Raises OSError.
    """
    number = _CLONE.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"clone on {os.uname().machine}")
    # The arguments after the first are null, so their order, which differs between architectures, does not matter.
    pid = _libc.syscall(ctypes.c_long(number), ctypes.c_long(_CLONE_FILES | signal.SIGCHLD), 0, 0, 0, 0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "clone")
    return int(pid)


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p), ("name_size", ctypes.c_uint32), ("vectors", ctypes.POINTER(_Vector)),
        ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]  # fmt: skip


def receive_descriptor(fd: int, byte: int, control: int, size: int) -> int:
    """recvmsg(2) of one byte to the address `byte`, and of control messages to `control`; return its result.

    Raises OSError.
    """
    vector = _Vector(byte, 1)
    header = _Header(None, 0, ctypes.pointer(vector), 1, control, size, 0)
    result = _libc.recvmsg(fd, ctypes.byref(header), 0x40000000 | 0x40)  # MSG_CMSG_CLOEXEC | MSG_DONTWAIT
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "recvmsg")
    return int(result)
