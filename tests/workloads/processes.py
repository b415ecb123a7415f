"""Processes and threads: what they are, and what they have said to the kernel of themselves."""

import ctypes
import os
import resource
import signal
import struct
import threading
from collections.abc import Iterator

from harness import Skip, call, child, equal, kind, make, say_ready


def _status(field: str, pid: object = "self") -> str:
    with open(f"/proc/{pid}/status") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(field + ":"))


def _get(option: int) -> int:
    """What prctl writes for an option."""
    value = ctypes.c_int(-1)
    call("prctl", option, ctypes.byref(value), 0, 0, 0)
    return value.value


@kind
def zombie() -> Iterator[None]:
    while True:
        pids = []
        for code in (7, -signal.SIGTERM):
            pid = os.fork()
            if pid == 0:
                if code < 0:
                    os.kill(os.getpid(), -code)
                os._exit(code)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            pids.append(pid)
        yield
        equal([_status("State", pid) for pid in pids], ["Z (zombie)"] * 2, "states")
        found = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        equal(found, [7, -signal.SIGTERM], "how they ended")


@kind
def stopped() -> Iterator[None]:
    """A stopped process stays so, and goes on when it is told to."""

    def count() -> None:
        say_ready()
        signal.pause()

    pid = child(count)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    while True:
        yield
        equal(_status("State", pid), "T (stopped)", "the state")
        os.kill(pid, signal.SIGCONT)
        os.waitpid(pid, os.WCONTINUED)
        equal(_status("State", pid)[0] in "SR", True, "goes on")
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)


@kind
def stopped_unreported() -> Iterator[None]:
    """A stopped process whose parent has not asked yet."""

    def wait() -> None:
        say_ready()
        signal.pause()

    pid = child(wait)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    while True:
        yield
        equal(os.waitpid(pid, os.WUNTRACED | os.WNOHANG)[0], pid, "the parent is told")
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


@kind
def sessions() -> Iterator[None]:
    """Process groups and sessions, one of them without its leader; an adopted child."""

    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        signal.pause()
    reader, writer = os.pipe()
    maker = os.fork()
    if maker == 0:
        os.setsid()
        pid = os.fork()
        if pid:
            os._exit(0)
        os.write(writer, str(os.getpid()).encode())
        signal.pause()
    orphan = int(os.read(reader, 20))
    os.waitpid(maker, 0)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while os.getpgid(leader) != leader:
        os.sched_yield()
    while True:
        yield
        equal((os.getpgid(leader), os.getsid(leader)), (leader, os.getsid(0)), "a group")
        equal((os.getpgid(orphan), os.getsid(orphan)), (maker, maker), "the session of a dead leader")
        with open(f"/proc/{orphan}/stat") as file:
            equal(file.read().rpartition(")")[2].split()[1], "1", "the parent")


@kind
def prctl_things() -> Iterator[None]:
    """Name, death signal, subreaper, dumpable, no-new-privileges, bounding set, keep-capabilities."""
    call("prctl", 15, ctypes.c_char_p(b"renamed"), 0, 0, 0)
    call("prctl", 1, 12, 0, 0, 0)
    call("prctl", 36, 1, 0, 0, 0)
    call("prctl", 38, 1, 0, 0, 0)
    call("prctl", 24, 25, 0, 0, 0)  # drops CAP_SYS_TIME
    call("prctl", 4, 0, 0, 0, 0)

    def found() -> dict[str, object]:
        return {
            "name": open("/proc/self/comm").read().strip(),
            "death signal": _get(2),
            "subreaper": _get(37),
            "no new privileges": call("prctl", 39, 0, 0, 0, 0),
            "bounding set": call("prctl", 23, 25, 0, 0, 0),
            "dumpable": call("prctl", 3, 0, 0, 0, 0),
        }

    before = found()
    while True:
        yield
        equal(found(), before)


def _prctl(get: int, set: int, *values: int) -> Iterator[None]:
    make("prctl", set, *(*values, 0, 0, 0, 0)[:4])
    before = call("prctl", get, 0, 0, 0, 0)
    while True:
        yield
        equal(call("prctl", get, 0, 0, 0, 0), before)


@kind
def keep_capabilities() -> Iterator[None]:
    return _prctl(7, 8, 1)


@kind
def secure_bits() -> Iterator[None]:
    return _prctl(27, 28, 0x4 | 0x8)  # NO_SETUID_FIXUP, locked


@kind
def no_huge_pages() -> Iterator[None]:
    return _prctl(42, 41, 1)


@kind
def io_flusher() -> Iterator[None]:
    return _prctl(58, 57, 1)


@kind
def machine_check_kill() -> Iterator[None]:
    return _prctl(34, 33, 1, 1)


@kind
def deny_write_execute() -> Iterator[None]:
    return _prctl(66, 65, 1)  # PR_SET_MDWE


@kind
def memory_merge() -> Iterator[None]:
    return _prctl(68, 67, 1)


@kind
def timer_slack() -> Iterator[None]:
    return _prctl(30, 29, 123456)


@kind
def no_time_stamp_counter() -> Iterator[None]:
    make("prctl", 26, 2, 0, 0, 0)
    while True:
        yield
        value = ctypes.c_int()
        call("prctl", 25, ctypes.byref(value), 0, 0, 0)
        equal(value.value, 2)


@kind
def inheritable_capability() -> Iterator[None]:
    """One that is not in the bounding set any longer."""
    header, data = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8), ctypes.create_string_buffer(24)
    call("capget", header, data)
    sets = list(struct.unpack("6I", data.raw))
    sets[2] |= 1  # CAP_CHOWN
    make("capset", header, ctypes.create_string_buffer(struct.pack("6I", *sets), 24))
    make("prctl", 24, 0, 0, 0, 0)
    before = open("/proc/self/status").read().partition("CapInh:")[2].split()[0]
    while True:
        yield
        equal(open("/proc/self/status").read().partition("CapInh:")[2].split()[0], before)


@kind
def speculation() -> Iterator[None]:
    """Speculative store bypass switched off for this process."""
    make("prctl", 53, 0, 4, 0, 0)  # PR_SPEC_DISABLE
    before = call("prctl", 52, 0, 0, 0, 0)
    while True:
        yield
        equal(call("prctl", 52, 0, 0, 0, 0), before)


@kind
def speculation_forced() -> Iterator[None]:
    make("prctl", 53, 0, 8, 0, 0)  # PR_SPEC_FORCE_DISABLE
    before = call("prctl", 52, 0, 0, 0, 0)
    while True:
        yield
        equal(call("prctl", 52, 0, 0, 0, 0), before)


@kind
def core_dump_filter() -> Iterator[None]:
    with open("/proc/self/coredump_filter", "w") as file:
        file.write("0x1f")
    while True:
        yield
        equal(int(open("/proc/self/coredump_filter").read(), 16), 0x1F)


@kind
def limits() -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (777, 888))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, 8 << 20))
    before = [resource.getrlimit(number) for number in range(16)]
    while True:
        yield
        equal([resource.getrlimit(number) for number in range(16)], before)


@kind
def umask() -> Iterator[None]:
    os.umask(0o27)
    while True:
        yield
        equal(os.umask(0o27), 0o27)


@kind
def changed_root() -> Iterator[None]:
    """chroot(2) into a directory, from which it works on."""
    os.makedirs("/tmp/root/below", exist_ok=True)

    def enter() -> None:
        os.chroot("/tmp/root")
        os.chdir("/below")
        say_ready()
        while True:
            signal.pause()

    pid = child(enter)
    while True:
        yield
        equal(os.readlink(f"/proc/{pid}/root"), "/tmp/root")
        equal(os.readlink(f"/proc/{pid}/cwd"), "/tmp/root/below")


@kind
def nice() -> Iterator[None]:
    os.nice(7)
    while True:
        yield
        equal(os.getpriority(os.PRIO_PROCESS, 0), 7)


@kind
def io_priority() -> Iterator[None]:
    make("syscall", 251, 1, 0, 2 << 13 | 6)  # best effort, 6
    while True:
        yield
        equal(call("syscall", 252, 1, 0), 2 << 13 | 6)


@kind
def oom_score() -> Iterator[None]:
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("432")
    except OSError as error:
        raise Skip(str(error)) from None
    while True:
        yield
        equal(open("/proc/self/oom_score_adj").read().strip(), "432")


@kind
def affinity() -> Iterator[None]:
    """Of a process and, differing, of one of its threads."""
    if os.cpu_count() == 1:
        raise Skip("there is one processor")
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {first})
    thread = _thread()
    os.sched_setaffinity(thread, {second})
    while True:
        yield
        equal(os.sched_getaffinity(0), {first}, "the process's")
        equal(os.sched_getaffinity(thread), {second}, "the thread's")


def _thread() -> int:
    """The id of a new thread that waits for ever."""
    ready, never = threading.Semaphore(0), threading.Semaphore(0)
    found: list[int] = []

    def wait() -> None:
        found.append(threading.get_native_id())
        ready.release()
        never.acquire()

    threading.Thread(target=wait, daemon=True).start()
    ready.acquire()
    return found[0]


@kind
def scheduling() -> Iterator[None]:
    """Policies of two threads."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    thread = _thread()
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    while True:
        yield
        equal((os.sched_getscheduler(0), os.sched_getscheduler(thread)), (os.SCHED_BATCH, os.SCHED_IDLE))


@kind
def real_time() -> Iterator[None]:
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(9))
    except OSError as error:
        raise Skip(str(error)) from None
    while True:
        yield
        equal((os.sched_getscheduler(0), os.sched_getparam(0).sched_priority), (os.SCHED_RR, 9))


@kind
def reset_on_fork() -> Iterator[None]:
    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    while True:
        yield
        equal(os.sched_getscheduler(0), os.SCHED_BATCH | os.SCHED_RESET_ON_FORK)


_ATTR = "IIQiIQQQII"


def _attributes(thread: int = 0) -> tuple[int, ...]:
    buffer = ctypes.create_string_buffer(56)
    call("syscall", 315, thread, buffer, 56, 0)
    return struct.unpack(_ATTR, buffer.raw)


@kind
def deadline() -> Iterator[None]:
    wanted = struct.pack(_ATTR, 56, 6, 0, 0, 0, 10_000_000, 30_000_000, 50_000_000, 0, 0)
    make("syscall", 314, 0, ctypes.create_string_buffer(wanted, 56), 0)
    before = _attributes()
    while True:
        yield
        equal(_attributes(), before)


@kind
def utilization_clamp() -> Iterator[None]:
    wanted = struct.pack(_ATTR, 56, 0, 0x20 | 0x40, 0, 0, 0, 0, 0, 100, 700)
    make("syscall", 314, 0, ctypes.create_string_buffer(wanted, 56), 0)
    before = _attributes()
    while True:
        yield
        equal(_attributes(), before)


@kind
def time_slice() -> Iterator[None]:
    """A time slice of its own (Linux 6.12)."""
    wanted = struct.pack(_ATTR, 56, 0, 0, 0, 0, 10_000_000, 0, 0, 0, 0)
    make("syscall", 314, 0, ctypes.create_string_buffer(wanted, 56), 0)
    before = _attributes()
    if before[5] != 10_000_000:
        raise Skip("this kernel has none")
    while True:
        yield
        equal(_attributes(), before)


@kind
def personality() -> Iterator[None]:
    make("personality", 0x0040000 | 0x0020000)  # ADDR_NO_RANDOMIZE, UNAME26
    while True:
        yield
        equal(call("personality", 0xFFFFFFFF), 0x0060000)


@kind
def threads() -> Iterator[None]:
    """Names, ids and local storage of threads."""
    local, asked, answers = threading.local(), [threading.Semaphore(0) for _ in range(3)], []
    done = threading.Semaphore(0)
    ids: dict[int, int] = {}

    def work(number: int) -> None:
        local.value = number * 11
        ids[number] = threading.get_native_id()
        call("prctl", 15, ctypes.c_char_p(f"worker-{number}".encode()), 0, 0, 0)
        done.release()
        while True:
            asked[number].acquire()
            answers.append((number, local.value, threading.get_native_id()))
            done.release()

    for number in range(3):
        threading.Thread(target=work, args=(number,), daemon=True).start()
        done.acquire()
    while True:
        yield
        for number in range(3):
            asked[number].release()
            done.acquire()
        equal(sorted(answers), [(number, number * 11, ids[number]) for number in range(3)])
        answers.clear()
        names = [open(f"/proc/self/task/{ids[number]}/comm").read().strip() for number in range(3)]
        equal(names, [f"worker-{number}" for number in range(3)])


@kind
def membarrier() -> Iterator[None]:
    make("syscall", 324, 16, 0, 0)  # REGISTER_PRIVATE_EXPEDITED
    while True:
        yield
        call("syscall", 324, 8, 0, 0)


@kind
def cpu_registers() -> Iterator[None]:
    """A thread that computes with floating point numbers all the while gets no other result."""
    import math

    def compute() -> float:
        return sum(math.sin(x) * math.sqrt(x) for x in range(20000))

    expected, wrong, stop = compute(), [0], [False]

    def work() -> None:
        while not stop[0]:
            wrong[0] += compute() != expected
            never.acquire(timeout=0.02)

    never = threading.Semaphore(0)
    threading.Thread(target=work, daemon=True).start()
    while True:
        yield
        equal(wrong[0], 0, "wrong results")


@kind
def supplementary_groups() -> Iterator[None]:
    """Groups, capabilities of all five kinds, loginuid."""

    def change() -> None:
        os.setgroups([5, 6, 7])
        os.setresgid(0, 0, 0)
        header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
        call("capset", header, ctypes.create_string_buffer(struct.pack("IIIIII", 0x21, 0x23, 0x3, 0, 0, 0), 24))
        call("prctl", 47, 2, 0, 0, 0)  # ambient: CAP_CHOWN
        say_ready()
        signal.pause()

    pid = child(change)
    names = ("Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Uid", "Gid")
    before = {name: _status(name, pid) for name in names}
    while True:
        yield
        equal({name: _status(name, pid) for name in names}, before)


@kind
def other_user() -> Iterator[None]:
    def change() -> None:
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        say_ready()
        signal.pause()

    pid = child(change)
    while True:
        yield
        equal(_status("Uid", pid).split(), ["1000"] * 4)


@kind
def other_group() -> Iterator[None]:
    def change() -> None:
        os.setresgid(1000, 1000, 1000)
        say_ready()
        signal.pause()

    pid = child(change)
    while True:
        yield
        equal(_status("Gid", pid).split(), ["1000"] * 4)


@kind
def environment() -> Iterator[None]:
    before = [open(f"/proc/self/{name}", "rb").read() for name in ("environ", "cmdline", "auxv")]
    exe = os.readlink("/proc/self/exe")
    while True:
        yield
        now = [open(f"/proc/self/{name}", "rb").read() for name in ("environ", "cmdline")]
        equal(now, before[:2])
        equal(os.readlink("/proc/self/exe"), exe)


@kind
def start_times() -> Iterator[None]:
    """When the process began, on the clock since boot (CRIU does not carry it)."""

    def began() -> int:
        with open("/proc/self/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])

    before = began()
    while True:
        yield
        equal(began(), before)


@kind
def traced() -> Iterator[None]:
    def wait() -> None:
        say_ready()
        signal.pause()

    pid = child(wait)
    make("ptrace", 0x4206, pid, 0, 0)  # PTRACE_SEIZE
    while True:
        yield
        equal(_status("TracerPid", pid), str(os.getpid()))


@kind
def system_call_dispatch() -> Iterator[None]:
    """prctl(PR_SET_SYSCALL_USER_DISPATCH)."""
    selector = ctypes.create_string_buffer(1)
    make("prctl", 59, 1, 0, 0, selector)
    while True:
        yield
        equal(_dispatch(), 1, "the mode")


def _dispatch() -> int:
    """The mode of the calling process, asked for by a child that traces it."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            call("ptrace", 16, parent, 0, 0)  # PTRACE_ATTACH
            os.waitpid(parent, 0x40000000)
            buffer = ctypes.create_string_buffer(32)
            call("ptrace", 0x4211, parent, 32, buffer)
            code = struct.unpack_from("Q", buffer.raw)[0]
            call("ptrace", 17, parent, 0, 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
