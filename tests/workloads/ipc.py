"""Signals that wait, System V and POSIX IPC, locks in shared memory."""

import ctypes
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator

from harness import call, child, equal, kind, libc, make, say_ready

_CREATE = 0o1600  # IPC_CREAT and 0600


@kind
def pending_signals() -> Iterator[None]:
    """For the process, with their order and values, and for one thread of it."""
    number = int(signal.SIGRTMIN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMIN})
    found: list[object] = []
    step = threading.Semaphore(0)
    done = threading.Semaphore(0)

    def thread() -> None:
        while True:
            step.acquire()
            got = signal.sigtimedwait({signal.SIGUSR2}, 1)
            found.append(got and got.si_signo)
            done.release()

    worker = threading.Thread(target=thread, daemon=True)
    worker.start()
    while True:
        for value in (11, 22, 33):
            call("sigqueue", os.getpid(), number, ctypes.c_void_p(value))
        signal.pthread_kill(worker.ident or 0, signal.SIGUSR2)
        yield
        values = []
        for _ in range(3):
            info = ctypes.create_string_buffer(128)
            mask = struct.pack("Q", 1 << (number - 1))
            timeout = ctypes.create_string_buffer(struct.pack("qq", 1, 0), 16)
            call("syscall", 128, ctypes.c_char_p(mask), info, timeout, 8)
            values.append(struct.unpack_from("i", info.raw, 24)[0])
            equal(struct.unpack_from("i", info.raw, 8)[0], -1, "si_code")
            equal(struct.unpack_from("i", info.raw, 16)[0], os.getpid(), "si_pid")
        equal(values, [11, 22, 33], "values")
        equal(signal.SIGUSR2 in signal.sigpending(), False, "the thread's signal pends for the process")
        found.clear()
        step.release()
        done.acquire()
        equal(found, [signal.SIGUSR2], "the thread's signal")


@kind
def signal_handlers() -> Iterator[None]:
    """Handlers, ignored signals, the mask, and a stack for handlers."""
    count = [0]
    signal.signal(signal.SIGUSR2, lambda *_: count.__setitem__(0, count[0] + 1))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    stack = mmap.mmap(-1, 1 << 16)
    address = ctypes.addressof(ctypes.c_char.from_buffer(stack))
    call("sigaltstack", ctypes.create_string_buffer(struct.pack("QiiQ", address, 0, 0, 1 << 16), 24), None)
    number = 0
    while True:
        yield
        number += 1
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGHUP)
        equal(count[0], number, "handler")
        equal(signal.SIGWINCH in signal.pthread_sigmask(signal.SIG_BLOCK, ()), True, "mask")
        now = ctypes.create_string_buffer(24)
        call("sigaltstack", None, now)
        equal(struct.unpack("QiiQ", now.raw)[0], address, "stack")


@kind
def sysv_shm() -> Iterator[None]:
    number = make("shmget", 0x51, 8192, _CREATE)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(number, None, 0)
    ctypes.memmove(address, b"hello shm", 9)
    alone = make("shmget", 0x52, 8192, _CREATE)  # attached to nothing
    second = libc.shmat(alone, None, 0)
    ctypes.memmove(second, b"alone", 5)
    libc.shmdt(ctypes.c_void_p(second))
    removed = make("shmget", 0, 4096, _CREATE)
    third = libc.shmat(removed, None, 0)
    call("shmctl", removed, 0, None)
    ctypes.memmove(third, b"removed", 7)
    while True:
        yield
        equal(ctypes.string_at(address, 9), b"hello shm", "contents")
        equal(call("shmget", 0x51, 8192, 0), number, "the id")
        again = libc.shmat(alone, None, 0)
        equal(ctypes.string_at(again, 5), b"alone", "what nobody has attached")
        libc.shmdt(ctypes.c_void_p(again))
        equal(ctypes.string_at(third, 7), b"removed", "what was removed")


@kind
def sysv_sem() -> Iterator[None]:
    number = make("semget", 0x53, 3, _CREATE)
    for index, value in enumerate((5, 0, 7)):
        call("semctl", number, index, 16, value)
    while True:
        yield
        equal([call("semctl", number, index, 12) for index in range(3)], [5, 0, 7], "values")
        equal(call("semget", 0x53, 3, 0), number, "the id")


@kind
def sysv_sem_undo() -> Iterator[None]:
    """What a process has taken is given back when it dies."""
    number = make("semget", 0x54, 1, _CREATE)
    call("semctl", number, 0, 16, 5)

    def take() -> None:
        call("semop", number, ctypes.c_char_p(struct.pack("Hhh", 0, -2, 0x1000)), 1)  # SEM_UNDO
        say_ready()
        signal.pause()

    while True:
        pid = child(take)
        yield
        equal(call("semctl", number, 0, 12), 3, "the value")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        equal(call("semctl", number, 0, 12), 5, "the value after the end of the process")


@kind
def sysv_msg() -> Iterator[None]:
    number = make("msgget", 0x55, _CREATE)

    def send(kind: int, text: bytes) -> None:
        call("msgsnd", number, ctypes.c_char_p(struct.pack("q", kind) + text), len(text), 0)

    def receive() -> tuple[int, bytes]:
        buffer = ctypes.create_string_buffer(108)
        libc.msgrcv.restype = ctypes.c_long
        size = libc.msgrcv(number, buffer, 100, 0, 0o4000)
        return struct.unpack_from("q", buffer.raw)[0], buffer.raw[8 : 8 + size]

    while True:
        send(3, b"first")
        send(9, b"second, longer")
        yield
        equal([receive(), receive()], [(3, b"first"), (9, b"second, longer")], "messages")


@kind
def posix_shm() -> Iterator[None]:
    """Shared memory by name, and a named semaphore (both are files in /dev/shm)."""
    fd = call("shm_open", ctypes.c_char_p(b"/holds"), os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    memory[:5] = b"posix"
    libc.sem_open.restype = ctypes.c_void_p
    semaphore = ctypes.c_void_p(libc.sem_open(b"/holds", os.O_CREAT, 0o600, 4))
    while True:
        yield
        equal(memory[:5], b"posix", "contents")
        with open("/dev/shm/holds", "rb") as file:
            equal(file.read(5), b"posix", "the file")
        value = ctypes.c_int()
        call("sem_getvalue", semaphore, ctypes.byref(value))
        equal(value.value, 4, "the semaphore")


def _mqueue(*, keep_open: bool) -> Iterator[None]:
    name = ctypes.c_char_p(b"/holds-open" if keep_open else b"/holds-closed")
    fd = make("mq_open", name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600, None)
    call("mq_send", fd, ctypes.c_char_p(b"message"), 7, 5)
    if not keep_open:
        call("mq_close", fd)
    while True:
        yield
        reader = fd if keep_open else call("mq_open", name, os.O_RDWR | os.O_NONBLOCK)
        buffer, priority = ctypes.create_string_buffer(8192), ctypes.c_uint()
        size = call("mq_receive", reader, buffer, 8192, ctypes.byref(priority))
        equal((buffer.raw[:size], priority.value), (b"message", 5), "the message")
        call("mq_send", reader, ctypes.c_char_p(b"message"), 7, 5)
        if not keep_open:
            call("mq_close", reader)


@kind
def mqueue() -> Iterator[None]:
    return _mqueue(keep_open=True)


@kind
def mqueue_closed() -> Iterator[None]:
    """A queue that no process has open."""
    return _mqueue(keep_open=False)


_MUTEX = 64


def _mutex(memory: mmap.mmap) -> ctypes.Array[ctypes.c_char]:
    """A robust mutex that processes share."""
    mutex = (ctypes.c_char * _MUTEX).from_buffer(memory)
    attributes = ctypes.create_string_buffer(16)
    libc.pthread_mutexattr_init(attributes)
    libc.pthread_mutexattr_setpshared(attributes, 1)
    libc.pthread_mutexattr_setrobust(attributes, 1)
    libc.pthread_mutex_init(mutex, attributes)
    return mutex


@kind
def robust_mutex() -> Iterator[None]:
    """Its holder dies after the move: who waits for it is told (EOWNERDEAD, 130)."""
    mutex = _mutex(mmap.mmap(-1, 4096))

    def hold() -> None:
        equal(libc.pthread_mutex_lock(mutex), 0)
        say_ready()
        signal.pause()

    def contend() -> None:
        say_ready()
        os._exit(3 if libc.pthread_mutex_lock(mutex) == 130 else 4)

    while True:
        holder = child(hold)
        contender = child(contend)
        yield
        equal(os.waitpid(contender, os.WNOHANG)[0], 0, "the contender has got it")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        equal(os.waitstatus_to_exitcode(os.waitpid(contender, 0)[1]), 3, "the contender's status")
        mutex = _mutex(mmap.mmap(-1, 4096))


@kind
def contended_mutex() -> Iterator[None]:
    """Threads that wait for a lock get it one after another."""
    while True:
        lock, got = threading.Lock(), []
        lock.acquire()

        def take(number: int, lock: threading.Lock = lock, got: list[int] = got) -> None:  # type: ignore[type-arg]
            with lock:
                got.append(number)

        threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        yield
        equal(got, [], "got it too early")
        lock.release()
        for thread in threads:
            thread.join(5)
        equal(sorted(got), list(range(5)), "got it")
