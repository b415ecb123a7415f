"""The process that injects system calls (injector.py). Standard input is its socket."""

import functools
import os
import signal
import socket

from migrate.memory import stopping, uffd
from migrate.memory.injection import Injection, InjectionFailed
from runtime.linux import processes, syscalls

_SYS_CLOSE = 3  # of x86-64, as `injection` is
_SYS_USERFAULTFD = uffd.NUMBER["x86_64"]


def main(_argv: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    processes.outlive_shortage()
    own = socket.socket(fileno=0)
    while word := own.recv(32):
        pid = int(word)
        try:
            fd = stopping.apart(functools.partial(_userfaultfd, pid))
        except (OSError, InjectionFailed) as error:
            own.send(str(error).encode()[:1000] or b"unknown")
            continue
        try:
            socket.send_fds(own, [b"\0"], [fd])
        finally:
            os.close(fd)
    return 0


def _userfaultfd(pid: int) -> int:
    """Make a userfaultfd in a process and take it out. Raises OSError, InjectionFailed."""
    pidfd = os.pidfd_open(pid)
    try:
        with Injection(pid) as process:
            inside = process.call(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | uffd.USER_MODE_ONLY)
            try:
                return syscalls.pidfd_getfd(pidfd, inside)
            finally:
                process.call(_SYS_CLOSE, inside)
    finally:
        os.close(pidfd)
