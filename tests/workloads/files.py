"""Locks, events and watches: what hangs on descriptors."""

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Iterator

from harness import Skip, call, elsewhere, equal, kind, make

_F_OFD_SETLK, _F_SETSIG = 37, 10
_FLOCK = "hhqqi4x"


@kind
def flock() -> Iterator[None]:
    fd = os.open("/tmp/flock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def is_held() -> bool:
        other = os.open("/tmp/flock", os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    while True:
        yield
        equal(is_held(), True, "held")


@kind
def posix_lock() -> Iterator[None]:
    """A read and a write lock on ranges of one file."""
    fd = os.open("/tmp/posix", os.O_RDWR | os.O_CREAT)
    fcntl.lockf(fd, fcntl.LOCK_EX, 10, 100)
    fcntl.lockf(fd, fcntl.LOCK_SH, 10, 200)

    def can(kind: int, start: int) -> bool:
        other = os.open("/tmp/posix", os.O_RDWR)
        try:
            fcntl.lockf(other, kind | fcntl.LOCK_NB, 1, start)
        except OSError:
            return False
        return True

    while True:
        yield
        found = [
            elsewhere(lambda kind=kind, start=start: can(kind, start))  # type: ignore[misc]
            for kind, start in (
                (fcntl.LOCK_SH, 99), (fcntl.LOCK_SH, 100), (fcntl.LOCK_SH, 109), (fcntl.LOCK_SH, 110),
                (fcntl.LOCK_SH, 205), (fcntl.LOCK_EX, 205),
            )
        ]  # fmt: skip
        equal(found, [True, False, False, True, True, False], "what another process may lock")


@kind
def ofd_lock() -> Iterator[None]:
    fd = os.open("/tmp/ofd", os.O_RDWR | os.O_CREAT)
    lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 5, 0)
    fcntl.fcntl(fd, _F_OFD_SETLK, lock)
    while True:
        yield
        other = os.open("/tmp/ofd", os.O_RDWR)
        try:
            fcntl.fcntl(other, _F_OFD_SETLK, lock)
            raise AssertionError("the lock is gone")
        except BlockingIOError:
            pass
        finally:
            os.close(other)


@kind
def lease() -> Iterator[None]:
    fd = os.open("/tmp/lease", os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    while True:
        yield
        equal(fcntl.fcntl(fd, fcntl.F_GETLEASE), fcntl.F_WRLCK, "the lease")


def _inotify(path: str) -> Iterator[None]:
    """A watch fires for what happens later."""
    os.makedirs(path, exist_ok=True)
    fd = make("inotify_init1", os.O_NONBLOCK)
    watch = call("inotify_add_watch", fd, ctypes.c_char_p(path.encode()), 0x100 | 0x200)  # IN_CREATE | IN_DELETE
    while True:
        yield
        with open(f"{path}/new", "w"):
            pass
        os.unlink(f"{path}/new")
        data = os.read(fd, 4096)
        found = []
        while data:
            number, mask, _, length = struct.unpack_from("iIII", data)
            found.append((number, mask, data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
        equal(found, [(watch, 0x100, b"new"), (watch, 0x200, b"new")], "events")


@kind
def inotify_tmpfs() -> Iterator[None]:
    return _inotify("/tmp/watched")


@kind
def inotify_rootfs() -> Iterator[None]:
    """A watch on a file of the read-only root file system."""
    fd = make("inotify_init1", os.O_NONBLOCK)
    call("inotify_add_watch", fd, ctypes.c_char_p(b"/programs/main.py"), 0x20)  # IN_OPEN
    while True:
        yield
        with open("/programs/main.py"):
            pass
        equal(struct.unpack_from("iI", os.read(fd, 4096)), (1, 0x20), "the event")


@kind
def inotify_pending() -> Iterator[None]:
    """Events that nobody has read yet."""
    os.makedirs("/tmp/pending", exist_ok=True)
    fd = make("inotify_init1", os.O_NONBLOCK)
    call("inotify_add_watch", fd, ctypes.c_char_p(b"/tmp/pending"), 0x100)
    number = 0
    while True:
        number += 1
        with open(f"/tmp/pending/{number}", "w"):
            pass
        yield
        data = os.read(fd, 4096)
        equal(data[16:].rstrip(b"\0"), str(number).encode(), "the event")


@kind
def fanotify() -> Iterator[None]:
    os.makedirs("/tmp/fan", exist_ok=True)
    fd = make("fanotify_init", 0x2, os.O_RDONLY)  # FAN_NONBLOCK
    make("fanotify_mark", fd, 1, 0x20 | 0x08000000, -100, ctypes.c_char_p(b"/tmp/fan"))  # FAN_OPEN | ON_CHILD
    while True:
        yield
        with open("/tmp/fan/x", "w"):
            pass
        data = os.read(fd, 4096)
        _, _, _, _, mask, event, _ = struct.unpack_from("IBBHQii", data)
        os.close(event)
        equal(mask, 0x20, "the event")


@kind
def eventfd() -> Iterator[None]:
    fd = os.eventfd(41, os.EFD_NONBLOCK)
    while True:
        yield
        equal(os.eventfd_read(fd), 41, "the counter")
        os.eventfd_write(fd, 41)


@kind
def eventfd_semaphore() -> Iterator[None]:
    fd = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    while True:
        yield
        equal(os.eventfd_read(fd), 1, "what is read")
        os.eventfd_write(fd, 1)


@kind
def epoll() -> Iterator[None]:
    """A set with a pipe, an eventfd, an inotify and another set in it; edge and level triggered, one-shot."""
    inner, outer = select.epoll(), select.epoll()
    reader, writer = os.pipe()
    counter = os.eventfd(0, os.EFD_NONBLOCK)
    once = os.eventfd(1, os.EFD_NONBLOCK)
    inner.register(reader, select.EPOLLIN)
    outer.register(inner.fileno(), select.EPOLLIN)
    outer.register(counter, select.EPOLLIN | select.EPOLLET)
    outer.register(once, select.EPOLLIN | select.EPOLLONESHOT)
    equal(outer.poll(0), [(once, select.EPOLLIN)], "before")
    while True:
        yield
        equal(outer.poll(0), [], "nothing")
        os.write(writer, b"x")
        os.eventfd_write(counter, 1)
        equal(sorted(outer.poll(0)), sorted([(inner.fileno(), 1), (counter, 1)]), "events")
        os.read(reader, 1)
        os.eventfd_read(counter)


@kind
def epoll_closed_descriptor() -> Iterator[None]:
    """A set that still watches a file whose number was closed, and which another number stands for."""
    outer = select.epoll()
    reader, writer = os.pipe()
    again = os.dup(reader)
    outer.register(reader, select.EPOLLIN)
    os.close(reader)
    while True:
        yield
        os.write(writer, b"x")
        equal(outer.poll(0), [(reader, select.EPOLLIN)], "events")
        os.read(again, 1)


@kind
def signalfd() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMIN})
    mask = struct.pack("Q", 1 << (signal.SIGUSR2 - 1) | 1 << (signal.SIGRTMIN - 1))
    fd = call("syscall", 289, -1, ctypes.c_char_p(mask), 8, os.O_NONBLOCK)
    while True:
        call("sigqueue", os.getpid(), int(signal.SIGRTMIN), ctypes.c_void_p(0x1234))
        os.kill(os.getpid(), signal.SIGUSR2)
        yield
        found = set()
        for _ in range(2):
            data = os.read(fd, 128)
            found.add((struct.unpack_from("I", data)[0], struct.unpack_from("i", data, 44)[0]))
        equal(found, {(signal.SIGUSR2, 0), (signal.SIGRTMIN, 0x1234)}, "signals")


@kind
def pipes() -> Iterator[None]:
    """Data in a pipe, its size, and who gets signals about it."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 17)
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reader, _F_SETSIG, int(signal.SIGRTMIN))
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    while True:
        os.write(writer, b"x" * 100000)
        while signal.sigtimedwait({signal.SIGRTMIN}, 0):
            pass
        yield
        equal(fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ), 1 << 17, "the size")
        equal(len(os.read(reader, 200000)), 100000, "what lies in it")
        while signal.sigtimedwait({signal.SIGRTMIN}, 0):
            pass
        os.write(writer, b"y")
        equal(signal.sigtimedwait({signal.SIGRTMIN}, 1) is not None, True, "the signal of O_ASYNC")
        os.read(reader, 10)


@kind
def packet_pipe() -> Iterator[None]:
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    while True:
        os.write(writer, b"one")
        os.write(writer, b"two")
        yield
        equal([os.read(reader, 100), os.read(reader, 100)], [b"one", b"two"], "packets")


@kind
def dnotify() -> Iterator[None]:
    os.makedirs("/tmp/dn", exist_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
    fd = os.open("/tmp/dn", os.O_RDONLY)
    fcntl.fcntl(fd, _F_SETSIG, int(signal.SIGRTMIN))
    try:
        fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
    except OSError as error:
        raise Skip(str(error)) from None
    number = 0
    while True:
        yield
        number += 1
        with open(f"/tmp/dn/{number}", "w"):
            pass
        equal(signal.sigtimedwait({signal.SIGRTMIN}, 1) is not None, True, "the signal")


@kind
def deleted_cwd() -> Iterator[None]:
    os.makedirs("/tmp/gone", exist_ok=True)
    os.chdir("/tmp/gone")
    os.rmdir("/tmp/gone")
    while True:
        yield
        equal(os.readlink("/proc/self/cwd"), "/tmp/gone (deleted)", "the directory")


@kind
def pidfd() -> Iterator[None]:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    fd = os.pidfd_open(pid)
    other = os.pidfd_open(1)
    while True:
        yield
        equal([select.select([fd], [], [], 0)[0], select.select([other], [], [], 0)[0]], [[], []], "ended")
        signal.pidfd_send_signal(fd, 0)


@kind
def io_uring() -> Iterator[None]:
    fd = make("syscall", 425, 8, ctypes.create_string_buffer(120))
    while True:
        yield
        equal(os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:[io_uring]")


@kind
def userfaultfd() -> Iterator[None]:
    fd = make("syscall", 323, 0)
    while True:
        yield
        equal(os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:[userfaultfd]")


@kind
def perf_event() -> Iterator[None]:
    attributes = ctypes.create_string_buffer(struct.pack("IIQQ", 1, 128, 1, 0), 128)  # a software event: task clock
    fd = make("syscall", 298, attributes, 0, -1, -1, 0)
    while True:
        yield
        equal(os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:[perf_event]")


@kind
def bpf_map() -> Iterator[None]:
    attributes = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 8, 4), 128)  # an array
    fd = make("syscall", 321, 0, attributes, 128)
    key, value = ctypes.create_string_buffer(struct.pack("I", 1), 4), ctypes.create_string_buffer(b"12345678", 8)
    at = ctypes.create_string_buffer(
        struct.pack("IIQQQ", fd, 0, ctypes.addressof(key), ctypes.addressof(value), 0), 128
    )
    call("syscall", 321, 2, at, 128)
    while True:
        yield
        found = ctypes.create_string_buffer(8)
        at = ctypes.create_string_buffer(
            struct.pack("IIQQQ", fd, 0, ctypes.addressof(key), ctypes.addressof(found), 0), 128
        )
        call("syscall", 321, 1, at, 128)
        equal(found.raw, b"12345678", "the value")


@kind
def bpf_program() -> Iterator[None]:
    code = struct.pack("BBhi", 0xB7, 0, 0, 0) + struct.pack("BBhi", 0x95, 0, 0, 0)
    body, licence = ctypes.create_string_buffer(code, 16), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("IIQQ", 1, 2, ctypes.addressof(body), ctypes.addressof(licence))
    fd = make("syscall", 321, 5, ctypes.create_string_buffer(attributes, 128), 128)
    while True:
        yield
        equal(os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:bpf-prog")


@kind
def aio() -> Iterator[None]:
    """A context for asynchronous I/O works on, and what it had finished is still to be had."""
    context = ctypes.c_ulong(0)
    make("syscall", 206, 64, ctypes.byref(context))
    fd = os.open("/tmp/aio", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"hello aio")
    buffer = ctypes.create_string_buffer(16)

    def submit(data: int) -> None:
        block = ctypes.create_string_buffer(
            struct.pack("QIiHhIQQqQII", data, 0, 0, 0, 0, fd, ctypes.addressof(buffer), 9, 0, 0, 0, 0), 64
        )
        pointer = ctypes.c_void_p(ctypes.addressof(block))
        equal(call("syscall", 209, context, 1, ctypes.byref(pointer)), 1, "io_submit")

    def reap() -> tuple[int, int]:
        event = ctypes.create_string_buffer(32)
        timeout = ctypes.create_string_buffer(struct.pack("qq", 1, 0), 16)
        equal(call("syscall", 208, context, 1, 1, event, timeout), 1, "io_getevents")
        data, _, result, _ = struct.unpack("QQqq", event.raw)
        return data, result

    number = 1
    while True:
        submit(number)
        yield
        equal(reap(), (number, 9), "the event")
        equal(buffer.raw[:9], b"hello aio", "the data")
        number += 1


@kind
def open_namespace() -> Iterator[None]:
    """Descriptors of the container's own namespaces."""
    fds = {name: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "mnt", "pid")}
    while True:
        yield
        for name, fd in fds.items():
            equal(os.fstat(fd).st_ino, os.stat(f"/proc/self/ns/{name}").st_ino, name)


@kind
def open_proc() -> Iterator[None]:
    """Descriptors of files in /proc of a process that lives."""
    fds = [os.open(path, os.O_RDONLY) for path in ("/proc/self/status", "/proc/1/stat", "/proc/sys/kernel/hostname")]
    fds.append(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY))
    while True:
        yield
        for fd in fds[:3]:
            equal(bool(os.pread(fd, 100, 0)), True)
        equal("1" in os.listdir(fds[3]), True)


@kind
def file_flags() -> Iterator[None]:
    """Offset, O_APPEND, O_PATH, close-on-exec, a shared offset, and a file that was deleted."""
    fd = os.open("/tmp/flags", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"0123456789")
    os.lseek(fd, 4, os.SEEK_SET)
    shared = os.dup(fd)
    path = os.open("/tmp", os.O_PATH | os.O_CLOEXEC)
    gone = os.open("/tmp/gone-file", os.O_RDWR | os.O_CREAT)
    os.write(gone, b"still here")
    os.unlink("/tmp/gone-file")
    while True:
        yield
        equal(os.read(shared, 2), b"45", "offset")
        equal(os.lseek(fd, 0, os.SEEK_CUR), 6, "the shared offset")
        os.lseek(fd, 4, os.SEEK_SET)
        equal(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND), True, "O_APPEND")
        equal(bool(fcntl.fcntl(path, fcntl.F_GETFL) & os.O_PATH), True, "O_PATH")
        equal(fcntl.fcntl(path, fcntl.F_GETFD), fcntl.FD_CLOEXEC, "close-on-exec")
        equal(os.pread(gone, 100, 0), b"still here", "the deleted file")
        try:
            os.open("/tmp/gone-file", os.O_RDONLY)
            raise AssertionError("the deleted file has a name again")
        except OSError as error:
            equal(error.errno, errno.ENOENT)
