"""What a process has locked itself into: namespaces, seccomp, Landlock, keyrings."""

import ctypes
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator

from harness import call, child, equal, kind, make, say_ready


def _namespace(flag: int, name: str, inside: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A child in a namespace of its own; `inside` is what it says of it."""
    reader, writer = os.pipe()
    answers, answer = os.pipe()

    def work() -> None:
        call("unshare", flag)
        if flag in (0x20000000, 0x80):  # for children only
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                return
        say_ready()
        while os.read(reader, 1):
            os.write(answer, repr((os.readlink(f"/proc/self/ns/{name}") != around(), inside())).encode())

    def around() -> str:
        """The parent's namespace, which has another number after a move; the one before where that cannot be seen."""
        try:
            return os.readlink(f"/proc/{os.getppid()}/ns/{name}")
        except OSError:
            return outer

    outer = os.readlink(f"/proc/self/ns/{name}")

    def ask() -> bytes:
        os.write(writer, b"x")
        return os.read(answers, 4096)

    child(work)
    before = ask()
    outer = os.readlink(f"/proc/self/ns/{name}")
    while True:
        yield
        equal(ask()[1:], before[1:])


@kind
def nested_pid_namespace() -> Iterator[None]:
    return _namespace(0x20000000, "pid", os.getpid)


@kind
def nested_user_namespace() -> Iterator[None]:
    return _namespace(0x10000000, "user", os.getuid)


@kind
def nested_network_namespace() -> Iterator[None]:
    return _namespace(0x40000000, "net", lambda: sorted(os.listdir("/proc/self/net/dev_snmp6")) if 0 else "net")


@kind
def nested_ipc_namespace() -> Iterator[None]:
    return _namespace(0x08000000, "ipc")


@kind
def nested_uts_namespace() -> Iterator[None]:
    def name() -> str:
        return os.uname().nodename

    return _namespace(0x04000000, "uts", name)


@kind
def nested_mount_namespace() -> Iterator[None]:
    os.makedirs("/tmp/nested", exist_ok=True)

    def mounted() -> list[str]:
        if not os.path.ismount("/tmp/nested"):
            call("mount", ctypes.c_char_p(b"none"), ctypes.c_char_p(b"/tmp/nested"), ctypes.c_char_p(b"tmpfs"), 0, None)
            with open("/tmp/nested/inside", "w"):
                pass
        return os.listdir("/tmp/nested")

    return _namespace(0x00020000, "mnt", mounted)


@kind
def nested_cgroup_namespace() -> Iterator[None]:
    return _namespace(0x02000000, "cgroup")


@kind
def nested_time_namespace() -> Iterator[None]:
    return _namespace(0x80, "time")


@kind
def time_namespace_for_children() -> Iterator[None]:
    """A process whose children are to be in another time namespace than it is."""
    make("unshare", 0x80)
    while True:
        yield
        paths = [os.readlink(f"/proc/self/ns/{name}") for name in ("time", "time_for_children")]
        equal(len(set(paths)), 2)


@kind
def pid_namespace_for_children() -> Iterator[None]:
    """The same of a pid namespace in which there is no process yet."""
    make("unshare", 0x20000000)
    while True:
        yield
        found = [os.path.exists(f"/proc/self/ns/{name}") for name in ("pid", "pid_for_children")]
        equal(found, [True, False])


@kind
def thread_namespace() -> Iterator[None]:
    """A thread in another network namespace than its process."""
    ready, step, done, found = (threading.Semaphore(0), threading.Semaphore(0), threading.Semaphore(0), [])

    def work() -> None:
        call("unshare", 0x40000000)
        ready.release()
        while True:
            step.acquire()
            found.append(os.readlink(f"/proc/self/task/{threading.get_native_id()}/ns/net"))
            done.release()

    threading.Thread(target=work, daemon=True).start()
    ready.acquire()
    while True:
        yield
        step.release()
        done.acquire()
        equal(found.pop() != os.readlink("/proc/self/ns/net"), True, "the thread has another namespace")


# BPF for seccomp: a system call of this number fails with EPERM, all others are allowed.
def _filter(number: int) -> bytes:
    return b"".join(
        struct.pack("HBBI", *row)
        for row in ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000))
    )


def _load(number: int) -> None:
    code = ctypes.create_string_buffer(_filter(number))
    program = ctypes.create_string_buffer(struct.pack("H6xQ", 4, ctypes.addressof(code)), 16)
    call("prctl", 38, 1, 0, 0, 0)
    call("prctl", 22, 2, program, 0, 0)


def _is_refused(path: str) -> bool:
    try:
        os.mkdir(path)
    except OSError as error:
        return error.errno == errno.EPERM
    os.rmdir(path)
    return False


@kind
def seccomp_filter() -> Iterator[None]:
    """Two filters on one thread, another on none of the others."""
    step, done, found = threading.Semaphore(0), threading.Semaphore(0), []

    def work() -> None:
        _load(83)  # mkdir
        _load(84)  # rmdir
        done.release()
        while True:
            step.acquire()
            found.append(_is_refused("/tmp/refused"))
            done.release()

    threading.Thread(target=work, daemon=True).start()
    done.acquire()
    while True:
        yield
        step.release()
        done.acquire()
        equal(found.pop(), True, "refused to the thread")
        equal(_is_refused("/tmp/allowed"), False, "refused to the others")


@kind
def seccomp_strict() -> Iterator[None]:
    reader, writer = os.pipe()
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(1)

    def work() -> None:
        say_ready()
        read, getppid = libc.read, libc.getppid
        libc.prctl(22, 1, 0, 0, 0)
        read(reader, buffer, 1)
        getppid()

    while True:
        pid = child(work)
        yield
        equal(os.waitpid(pid, os.WNOHANG)[0], 0, "ended")
        os.write(writer, b"x")
        equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -signal.SIGKILL, "what it is not allowed to do")


@kind
def seccomp_listener() -> Iterator[None]:
    code = ctypes.create_string_buffer(_filter(83))
    program = ctypes.create_string_buffer(struct.pack("H6xQ", 4, ctypes.addressof(code)), 16)
    call("prctl", 38, 1, 0, 0, 0)
    fd = make("syscall", 317, 1, 8, program)
    while True:
        yield
        equal(os.readlink(f"/proc/self/fd/{fd}"), "anon_inode:seccomp notify")


@kind
def landlock() -> Iterator[None]:
    """A process that has given up its right to write anywhere."""
    attributes = ctypes.create_string_buffer(struct.pack("Q", 1 << 1 | 1 << 8), 8)  # WRITE_FILE, MAKE_REG
    rules = make("syscall", 444, attributes, 8, 0)
    os.close(rules)

    reader, writer = os.pipe()
    answers, answer = os.pipe()

    def work() -> None:
        inner = call("syscall", 444, attributes, 8, 0)
        call("prctl", 38, 1, 0, 0, 0)
        call("syscall", 446, inner, 0)
        os.close(inner)
        say_ready()
        while os.read(reader, 1):
            try:
                os.open("/tmp/forbidden", os.O_WRONLY | os.O_CREAT)
                os.write(answer, b"allowed")
            except PermissionError:
                os.write(answer, b"refused")

    child(work)
    while True:
        yield
        os.write(writer, b"x")
        equal(os.read(answers, 100), b"refused", "a write")


@kind
def session_keyring() -> Iterator[None]:
    """A key in the container's session keyring."""
    session = make("syscall", 250, 0, -3, 0)
    key = make("syscall", 248, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"holds"), ctypes.c_char_p(b"secret"), 6, -3)
    while True:
        yield
        equal(call("syscall", 250, 10, -3, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"holds"), 0), key, "the key")
        equal(call("syscall", 250, 0, -3, 0), session, "the keyring")


@kind
def no_foreign_keyring() -> Iterator[None]:
    """The session keyring is the container's own: nothing of whoever restored it is in it."""

    def describe() -> str:
        buffer = ctypes.create_string_buffer(200)
        make("syscall", 250, 6, -3, buffer, 200)
        return buffer.value.decode().rpartition(";")[2]

    before = describe()
    while True:
        yield
        equal(describe(), before, "the session keyring's name")


@kind
def process_keyring() -> Iterator[None]:
    key = make("syscall", 248, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"own"), ctypes.c_char_p(b"secret"), 6, -2)
    while True:
        yield
        equal(call("syscall", 250, 10, -2, ctypes.c_char_p(b"user"), ctypes.c_char_p(b"own"), 0), key, "the key")
