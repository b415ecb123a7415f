"""linux.seccomp in whole containers: created, run and exec'ed."""

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.boxes import PATIENCE, Fields, Listener, listener, make, output, refusal, run
from tests.system.conftest import Local

NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND (linux/seccomp.h)
CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
EPERM, ENOSYS, EXDEV = 1, 38, 18
USERS: dict[str, Fields] = {
    "root": {"process.noNewPrivileges": True},
    "privileges": {"process.noNewPrivileges": False},
    "user": {"process.noNewPrivileges": True, "process.user": {"uid": 99, "gid": 99}},
    "user-privileges": {"process.noNewPrivileges": False, "process.user": {"uid": 99, "gid": 99}},
}
# What a shell of busybox with echo and mkdir needs; all else is refused.
STRICT = [
    "read",
    "write",
    "close",
    "fstat",
    "newfstatat",
    "stat",
    "lstat",
    "access",
    "openat",
    "execve",
    "exit_group",
    "exit",
    "brk",
    "mmap",
    "munmap",
    "mprotect",
    "arch_prctl",
    "set_tid_address",
    "set_robust_list",
    "rseq",
    "prlimit64",
    "getrandom",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "getpid",
    "getppid",
    "getcwd",
    "fcntl",
    "dup",
    "dup2",
    "ioctl",
    "wait4",
    "clone",
    "vfork",
    "fork",
    "uname",
    "lseek",
    "poll",
    "prctl",
    "gettid",
    "futex",
    "pread64",
]


def filtered(action: str, *names: str, default: str = "SCMP_ACT_ALLOW", **more: Any) -> Fields:
    rule = {"names": list(names), "action": action}
    rule |= {"errnoRet": more.pop("errno")} if "errno" in more else {}
    return {"linux.seccomp": {"defaultAction": default, "syscalls": [rule], **more}}


@pytest.mark.parametrize("who", USERS)
def test_errno(pymigrate: Local, tmp_path: Path, who: str) -> None:
    fields = {**USERS[who], **filtered("SCMP_ACT_ERRNO", "mkdir", "mkdirat", errno=EXDEV)}
    said = output(pymigrate, tmp_path, "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; mkdir /tmp/x 2>&1; "
                  "test -d /tmp/x || echo none", fields)  # fmt: skip
    privileges = int(bool(fields["process.noNewPrivileges"]))
    assert said.splitlines() == [
        f"NoNewPrivs:\t{privileges}", "Seccomp:\t2",
        "mkdir: can't create directory '/tmp/x': Invalid cross-device link", "none",
    ]  # fmt: skip


@pytest.mark.parametrize("who", USERS)
def test_kill(pymigrate: Local, tmp_path: Path, who: str) -> None:
    fields = {**USERS[who], **filtered("SCMP_ACT_KILL_PROCESS", "mkdir", "mkdirat")}
    done = run(pymigrate, tmp_path, "mkdir /tmp/x; echo $?; exec mkdir /tmp/x", fields)
    assert (done.stdout, done.returncode) == ("159\n", 159), done.stderr  # 128 + SIGSYS


@pytest.mark.parametrize("who", USERS)
def test_strict_profile(pymigrate: Local, tmp_path: Path, who: str) -> None:
    fields = {**USERS[who], **filtered("SCMP_ACT_ALLOW", *STRICT, default="SCMP_ACT_ERRNO", defaultErrnoRet=ENOSYS)}
    if who in ("user-privileges", "privileges"):
        # Without no_new_privs it is loaded before the capabilities are given up, as runc does: that must be allowed.
        fields["linux.seccomp"]["syscalls"][0]["names"] = [*STRICT, "capset", "capget"]
    done = run(pymigrate, tmp_path, "echo up; (mkdir /tmp/x) 2>&1; true", fields)
    assert (done.returncode, done.stdout) == (
        0,
        "up\nmkdir: can't create directory '/tmp/x': Function not implemented\n",
    ), done
    pymigrate("run", "-d", "-b", make(tmp_path / "d", "exec cat", fields), "d", stdin=None, input="")


def test_filter_that_forbids_our_own_last_steps_says_so(pymigrate: Local, tmp_path: Path) -> None:
    assert "execve" not in refusal(pymigrate, tmp_path, filtered("SCMP_ACT_ERRNO", "write"))
    done = run(pymigrate, tmp_path, "true", filtered("SCMP_ACT_ERRNO", "execve", errno=EPERM))
    assert (done.returncode, "process.args[0]: exec: 'sh': operation not permitted" in done.stderr) == (1, True), done


class Agent(threading.Thread):
    """Answers notifications: `answer` makes an errno of the system call's number, 0 lets it go on."""

    def __init__(self, at: Listener, refused: int) -> None:
        super().__init__(daemon=True)
        self._at, self._refused = at, refused
        self.message: dict[str, Any] = {}
        self.seen: list[int] = []

    def run(self) -> None:
        data, fd = self._at.receive()
        self.message = json.loads(data)
        while True:
            request = bytearray(80)
            try:
                fcntl.ioctl(fd, NOTIF_RECV, request)
                number, *_ = struct.unpack_from("=Q", request)
                # Who asks, outside of its pid namespace.
                self.seen.append(struct.unpack_from("=I", request, 8)[0])
                answer = struct.pack("=QqiI", number, 0, -self._refused, 0 if self._refused else CONTINUE)
                fcntl.ioctl(fd, NOTIF_SEND, bytearray(answer))
            except OSError:
                break  # nobody is under the filter any more
        os.close(fd)


@pytest.fixture
def agent_socket(tmp_path: Path) -> Iterator[Listener]:
    with listener(tmp_path / "agent") as found:
        yield found


def notified(path: Path) -> Fields:
    return filtered("SCMP_ACT_NOTIFY", "mkdir", "mkdirat", listenerPath=str(path), listenerMetadata="some words")


@pytest.mark.parametrize("who", USERS)
def test_notify_in_run(pymigrate: Local, tmp_path: Path, agent_socket: Listener, who: str) -> None:
    agent = Agent(agent_socket, EXDEV)
    agent.start()
    said = output(pymigrate, tmp_path, "mkdir /tmp/x 2>&1; :", {**USERS[who], **notified(agent_socket.path)})
    agent.join(PATIENCE)
    assert "Invalid cross-device link" in said
    assert len(agent.seen) == 1
    message = agent.message
    assert (message["fds"], message["metadata"], message["state"]["id"]) == (["seccompFd"], "some words", "c")
    assert (message["pid"], message["state"]["status"]) == (message["state"]["pid"], "creating")
    assert message["ociVersion"] == message["state"]["ociVersion"]


def test_notify_in_create_and_exec(pymigrate: Local, tmp_path: Path, agent_socket: Listener) -> None:
    bundle = make(tmp_path / "b", "mkdir /tmp/x && echo made; sleep 60", notified(agent_socket.path))
    first = Agent(agent_socket, 0)
    first.start()
    pymigrate("create", "-b", bundle, "c")
    pymigrate("start", "c")
    deadline = PATIENCE
    first.join(0)
    while pymigrate("logs", "c").stdout != "made\n" and deadline > 0:
        deadline -= 0.1
    second = Agent(agent_socket, EXDEV)
    second.start()
    done = pymigrate("exec", "c", "mkdir", "/tmp/y", check=False)
    assert "Invalid cross-device link" in done.stderr
    second.join(PATIENCE)
    assert (len(second.seen), second.message["state"]["status"]) == (1, "running")
    assert second.message["pid"] not in (0, pymigrate.state("c")["pid"])
    assert second.message["state"]["pid"] == pymigrate.state("c")["pid"]


def test_agent_that_is_not_there(pymigrate: Local, tmp_path: Path) -> None:
    said = refusal(pymigrate, tmp_path, notified(tmp_path / "nobody"))
    assert f"linux.seccomp.listenerPath: {tmp_path / 'nobody'}: No such file or directory" in said


def test_exec_is_under_the_filter(pymigrate: Local, tmp_path: Path) -> None:
    for number, fields in enumerate(USERS.values()):
        bundle = make(tmp_path / f"b{number}", "sleep 60", {**fields, **filtered("SCMP_ACT_ERRNO", "mkdir", "mkdirat")})
        pymigrate("run", "-d", "-b", bundle, f"c{number}")
        done = pymigrate("exec", f"c{number}", "mkdir", "/tmp/x", check=False)
        assert (done.returncode, "Operation not permitted" in done.stderr) == (1, True), done
