"""Compiled filters in a process of this machine: the kernel's own answers."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import StartFailed
from runtime.linux import syscalls
from runtime.seccomp import filter as seccomp_filter
from runtime.seccomp import libseccomp
from runtime.seccomp.load import load, send_listener, take_listener
from runtime.spec.fields import Fields
from runtime.spec.seccomp import parse

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls by their x86-64 numbers")

GETPRIORITY, GETPPID, MKDIR, EXECVE, STATX = 140, 110, 83, 59, 332
# What the interpreter may call between load and the end of the child.
INTERPRETER = "read write exit_group brk mmap munmap mremap futex rt_sigprocmask rt_sigaction rt_sigreturn"
CHILD_FAILED = 250
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def compiled(default: str, *syscalls_: dict[str, Any], **more: Any) -> bytes:
    value = {"defaultAction": default, "syscalls": syscalls_, "listenerPath": "/agent", **more}
    seccomp = parse(Fields(json.loads(json.dumps(value)), "config.json", "linux.seccomp"))
    assert seccomp is not None
    return seccomp_filter.compile(seccomp)


def rule(names: str, action: str, *args: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"names": names.split(), "action": action, "args": args, **more}


def call(number: int, *args: Any) -> int:
    """0, or the errno."""
    ctypes.set_errno(0)
    libc.syscall(number, *args)
    return ctypes.get_errno()


def child(act: Callable[[], int]) -> int:
    """The pid of a child that ends with what `act` returns; StartFailed goes to its stderr."""
    pid = os.fork()
    if pid:
        return pid
    try:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a test that fails leaves nobody waiting
        os._exit(act())
    except BaseException as error:
        os.write(2, f"child: {error!r}\n".encode())
    finally:
        os._exit(CHILD_FAILED)


def end_of(pid: int) -> int:
    """The exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def under(program: bytes, act: Callable[[], int], flags: int = 0) -> int:
    def run() -> int:
        load(program, flags, listener=False)
        return act()

    return end_of(child(run))


def test_errno_with_its_number(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "made")
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", "SCMP_ACT_ERRNO", errnoRet=errno.EXDEV))
    assert under(program, lambda: call(MKDIR, path, 0o700)) == errno.EXDEV
    assert under(compiled("SCMP_ACT_ALLOW", rule("mkdir", "SCMP_ACT_ERRNO")), lambda: call(MKDIR, path)) == errno.EPERM
    # Zero pretends success.
    program = compiled("SCMP_ACT_ALLOW", rule("mkdir", "SCMP_ACT_ERRNO", errnoRet=0))
    assert under(program, lambda: call(MKDIR, path, 0o700)) == 0
    assert not (tmp_path / "made").exists()


def test_a_rule_is_about_its_own_call_only(tmp_path: Path) -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("rmdir", "SCMP_ACT_KILL_PROCESS"))
    assert under(program, lambda: call(MKDIR, os.fsencode(tmp_path / "made"), 0o700)) == 0
    assert (tmp_path / "made").is_dir()


def in_a_thread() -> int:
    """getppid in a second thread, whose end the first one awaits by a descriptor of it (PIDFD_THREAD, Linux 6.9)."""
    ready, go = threading.Event(), threading.Event()
    tid = 0

    def work() -> None:
        nonlocal tid
        tid = threading.get_native_id()
        ready.set()
        go.wait()
        call(GETPPID)

    threading.Thread(target=work, daemon=True).start()
    ready.wait()
    fd = libc.pidfd_open(tid, os.O_EXCL)
    go.set()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return 7 if fd >= 0 and poll.poll(20_000) else 8


@pytest.mark.parametrize(
    ("action", "alone", "threaded"),
    [
        ("SCMP_ACT_KILL", -signal.SIGSYS, 7),
        ("SCMP_ACT_KILL_THREAD", -signal.SIGSYS, 7),
        ("SCMP_ACT_KILL_PROCESS", -signal.SIGSYS, -signal.SIGSYS),
    ],
)
def test_kill(action: str, alone: int, threaded: int) -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("getppid", action))
    assert under(program, lambda: call(GETPPID)) == alone
    assert under(program, in_a_thread) == threaded


def test_trap_can_be_handled() -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("getppid", "SCMP_ACT_TRAP"))
    assert under(program, lambda: call(GETPPID)) == -signal.SIGSYS

    def handled() -> int:
        signal.signal(signal.SIGSYS, lambda *_: os._exit(42))
        call(GETPPID)
        return 1

    assert under(program, handled) == 42


def test_log_lets_pass_and_leaves_a_record() -> None:
    """Read from the audit multicast group: the kernel's log drops such lines when there are many."""
    program = compiled("SCMP_ACT_ALLOW", rule("getppid", "SCMP_ACT_LOG"))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9) as audit:  # NETLINK_AUDIT
        audit.bind((0, 1))  # AUDIT_NLGRP_READLOG
        audit.settimeout(20)
        pid = child(lambda: (load(program, 0, listener=False), call(GETPPID))[1])
        assert end_of(pid) == 0
        record = b""
        while b" pid=%d " % pid not in record:
            record = audit.recv(8192)
    assert struct.unpack_from("=IH", record)[1] == 1326  # AUDIT_SECCOMP
    assert b" syscall=110 " in record
    assert b" code=0x7ffc0000" in record


def test_trace_without_and_with_a_tracer() -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("getppid", "SCMP_ACT_TRACE", errnoRet=1234))
    assert under(program, lambda: call(GETPPID)) == errno.ENOSYS

    def traced() -> int:
        libc.ptrace(0, 0, None, None)  # PTRACE_TRACEME
        os.kill(os.getpid(), signal.SIGSTOP)
        load(program, 0, listener=False)
        return call(GETPPID)

    pid = child(traced)
    assert os.WIFSTOPPED(os.waitpid(pid, 0)[1])
    libc.ptrace(0x4200, pid, None, ctypes.c_void_p(1 << 7 | 1 << 20))  # SETOPTIONS: TRACESECCOMP, EXITKILL
    libc.ptrace(7, pid, None, None)  # CONT
    status = os.waitpid(pid, 0)[1]
    assert status >> 8 == signal.SIGTRAP | 7 << 8  # PTRACE_EVENT_SECCOMP
    message = ctypes.c_ulong()
    libc.ptrace(0x4201, pid, None, ctypes.byref(message))  # GETEVENTMSG
    assert message.value == 1234
    libc.ptrace(7, pid, None, None)
    assert end_of(pid) == 0


@pytest.mark.parametrize(
    ("op", "value", "value_two", "hit", "miss"),
    [
        ("EQ", 5, 0, 5, 6), ("NE", 5, 0, 6, 5), ("LT", 5, 0, 4, 5), ("LE", 5, 0, 5, 6), ("GT", 5, 0, 6, 5),
        ("GE", 5, 0, 5, 4), ("MASKED_EQ", 0xF0, 0x20, 0x2A, 0x3A), ("EQ", 2**40, 0, 2**40, 0),
    ],
)  # fmt: skip
def test_arguments(op: str, value: int, value_two: int, hit: int, miss: int) -> None:
    comparison = {"index": 2, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": value_two}
    program = compiled("SCMP_ACT_ALLOW", rule("getpriority", "SCMP_ACT_ERRNO", comparison, errnoRet=99))
    assert under(program, lambda: call(GETPRIORITY, 0, 0, ctypes.c_long(hit))) == 99
    assert under(program, lambda: call(GETPRIORITY, 0, 0, ctypes.c_long(miss))) == 0


def test_newer_calls_are_enosys_and_older_ones_get_the_default() -> None:
    program = compiled("SCMP_ACT_ERRNO", rule(INTERPRETER, "SCMP_ACT_ALLOW"))  # exit_group, 231, is its largest
    assert under(program, lambda: call(MKDIR, b"/", 0)) == errno.EPERM
    assert call(STATX, -1, b"/", 0, 0, None) != errno.ENOSYS  # this kernel has it
    assert under(program, lambda: call(STATX, -1, b"/", 0, 0, None)) == errno.ENOSYS


def test_init_needs_nothing_but_write_and_exec_after_loading() -> None:
    rules = (rule("write exit_group", "SCMP_ACT_ALLOW"), rule("execve", "SCMP_ACT_ERRNO", errnoRet=77))
    program = compiled("SCMP_ACT_KILL_PROCESS", *rules)
    reading, writing = os.pipe()

    def init() -> int:
        number = load(program, 0, listener=True)
        os.write(writing, b"%d" % (number or 0))
        try:
            os.execve("/bin/true", ["true"], {})
        except OSError as error:
            os._exit(error.errno or 0)

    assert end_of(child(init)) == 77
    os.close(writing)
    assert int(os.read(reading, 16)) > 2
    os.close(reading)


def test_a_listener_reaches_its_agent(tmp_path: Path) -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("getpriority read close", "SCMP_ACT_NOTIFY"))
    ours, theirs = socket.socketpair()
    path = str(tmp_path / "agent.sock")
    state = {"ociVersion": "1.2.0", "id": "box", "status": "creating", "pid": 0, "bundle": "/b", "annotations": {}}

    def init() -> int:
        number = load(program, 0, listener=True)
        os.write(theirs.fileno(), b"%d" % (number or 0))
        theirs.recv(1)
        return int(libc.syscall(GETPRIORITY, 0, 0))

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        pid = child(init)
        state["pid"] = pid
        fd = take_listener(pid, int(ours.recv(16)))
        with ThreadPoolExecutor(1) as sender:
            # More than one sendmsg takes.
            sent = sender.submit(send_listener, path, fd, pid, state, metadata="opaque" * 100_000)
            with listening.accept()[0] as agent:
                data, fds, _, _ = socket.recv_fds(agent, 1 << 16, 4)
                while more := agent.recv(1 << 16):
                    data += more
            sent.result()
        os.close(fd)
    assert json.loads(data) == {
        "ociVersion": "1.2.0", "fds": ["seccompFd"], "pid": pid, "metadata": "opaque" * 100_000, "state": state,
    }  # fmt: skip
    (listener,) = fds
    ours.send(b"x")
    request = bytearray(80)  # struct seccomp_notif
    fcntl.ioctl(listener, 0xC0502100, request)  # SECCOMP_IOCTL_NOTIF_RECV
    identity, who, _, number = struct.unpack_from("=QIIi", request)
    assert (who, number) == (pid, GETPRIORITY)
    fcntl.ioctl(listener, 0xC0182101, struct.pack("=QqiI", identity, 55, 0, 0))  # SECCOMP_IOCTL_NOTIF_SEND
    assert end_of(pid) == 55
    for each in (listener, ours, theirs):
        os.close(each) if isinstance(each, int) else each.close()


def test_an_agent_that_is_not_there(tmp_path: Path) -> None:
    path = str(tmp_path / "nobody.sock")
    with pytest.raises(StartFailed, match=r"linux.seccomp.listenerPath: .*nobody.sock: No such file or directory"):
        send_listener(path, 0, 1, {"ociVersion": "1.2.0"})
    with pytest.raises(StartFailed, match=r"linux.seccomp.listenerPath: .*too long"):
        send_listener("/" + "x" * 200, 0, 1, {"ociVersion": "1.2.0"})


def test_no_init_to_take_a_listener_from() -> None:
    pid = child(lambda: 0)
    end_of(pid)
    with pytest.raises(StartFailed, match="cannot duplicate the listener of init: No such process"):
        take_listener(pid, 3)


def refusal(act: Callable[[], object]) -> str:
    """What StartFailed says in a child."""
    reading, writing = os.pipe()

    def run() -> int:
        try:
            act()
        except StartFailed as error:
            os.write(writing, str(error).encode())
        return 0

    pid = child(run)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    assert end_of(pid) == 0
    return text


def test_who_may_load() -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("getppid", "SCMP_ACT_ERRNO"))

    def unprivileged() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        load(program, 0, listener=False)

    def without_new_privileges() -> None:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        load(program, 0, listener=False)

    assert refusal(unprivileged) == "config.json: linux.seccomp: needs process.noNewPrivileges or CAP_SYS_ADMIN"
    assert refusal(without_new_privileges) == ""


def test_one_listener_only() -> None:
    program = compiled("SCMP_ACT_ALLOW", rule("getppid", "SCMP_ACT_NOTIFY"))
    said = refusal(lambda: [load(program, 0, listener=True) for _ in range(2)])
    assert "has a filter with a listener already" in said


@pytest.mark.parametrize(
    ("names", "notify"),
    [
        ([], False),
        (["TSYNC", "LOG", "SPEC_ALLOW"], False),
        (["TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"], True),
    ],
)
def test_flags_are_taken(names: list[str], notify: bool) -> None:
    value = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "flags": [f"SECCOMP_FILTER_FLAG_{name}" for name in names],
        "syscalls": [{"names": ["getppid"], "action": "SCMP_ACT_NOTIFY"}] if notify else [],
        "listenerPath": "/agent",
    }
    seccomp = parse(Fields(value, "config.json", "linux.seccomp"))
    assert seccomp is not None
    program = seccomp_filter.compile(seccomp)

    def filters() -> int:
        load(program, seccomp.load_flags, listener=seccomp.notifies)
        status = dict(
            line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
        )
        return int(status["Seccomp"]) * 10 + int(status["Seccomp_filters"])

    assert end_of(child(filters)) == 21


def int_0x80(number: int) -> int:
    """A 32-bit system call from this 64-bit process; eax as it comes back, -errno on failure."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x53\xb8" + struct.pack("<I", number) + b"\x31\xdb\xcd\x80\x5b\xc3")  # ebx = 0, as rbx is the caller's
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def test_32_bit_calls() -> None:
    try:
        assert end_of(child(lambda: int_0x80(64) == os.getppid() and 7)) == 7
    except AssertionError:
        pytest.skip("this kernel runs no 32-bit system calls (CONFIG_IA32_EMULATION)")
    deny = rule("getppid", "SCMP_ACT_ERRNO", errnoRet=77)
    native = compiled("SCMP_ACT_ALLOW", deny)
    both = compiled("SCMP_ACT_ALLOW", deny, architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    assert under(both, lambda: -int_0x80(64)) == 77
    assert under(both, lambda: call(GETPPID)) == 77
    assert under(both, lambda: int_0x80(20) == os.getpid() and 7) == 7
    assert under(native, lambda: -int_0x80(20)) == -signal.SIGSYS


def test_a_host_without_the_library() -> None:
    """The library's file is covered in a mount namespace of the command's own."""
    libseccomp.version()
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next(line.split()[-1] for line in maps if "libseccomp.so" in line)
    code = (
        "from runtime.seccomp import filter as seccomp_filter\n"
        "from runtime.errors import NotSupported\n"
        "from runtime.spec.seccomp import Seccomp\n"
        "try:\n"
        "    seccomp_filter.compile(Seccomp('SCMP_ACT_ALLOW', None, (), (), (), None, None))\n"
        "except NotSupported as error:\n"
        "    print(error, error.remedy, sep='\\n')\n"
    )
    script = 'mount --bind /dev/null "$1" && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", library, sys.executable, code],
        capture_output=True, text=True, check=True, timeout=60, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    problem, remedy = done.stdout.splitlines()
    assert problem.startswith("config.json: linux.seccomp: the library libseccomp.so.2 is missing: ")
    assert remedy == "apt-get install libseccomp2"
