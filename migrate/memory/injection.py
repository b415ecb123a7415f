"""Run system calls inside another process by ptrace(2), without its notice.

All threads of the process are stopped meanwhile, so that no other thread can fork in between. Signals are blocked, the
seccomp filter is suspended, and registers and signal mask are restored. A process stands still for 0.2 to 0.3 ms, and
some 20 us more for each thread. Only a thread that is about to return to user space can be used; one that does not stop
in time (frozen, or waiting for a disk) makes `Injection` fail without a trace in the process.

All calls must be made by one thread, which `stopping.apart` makes for them.
"""

import contextlib
import ctypes
import os
import platform
import time
from types import TracebackType
from typing import Self

from migrate.memory.stopping import StopFailed, Stopped, ptrace, wait

_SINGLESTEP, _GETREGS, _SETREGS, _GETSIGMASK, _SETSIGMASK = 9, 12, 13, 0x420A, 0x420B
_SUSPEND_SECCOMP = 1 << 21
_SIGTRAP = 5
_TIMEOUT = 0.2  # seconds for all threads to stop
_STEPS = 16
_SYSCALL = b"\x0f\x05"
_ALL_SIGNALS = b"\xff" * 8
_CS_64 = 0x33


class InjectionFailed(Exception):
    """System calls cannot be run in a process, which is unchanged. `str` says why."""


class _Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = [
        (name, ctypes.c_ulong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


def is_possible() -> bool:
    """Return whether this module knows the processor."""
    return platform.machine() == "x86_64"


class Injection:
    """A stopped process, in which `call` runs system calls. A context manager: leaving it lets the process continue."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped = Stopped(pid, _TIMEOUT, _SUSPEND_SECCOMP)
        self._signals: list[int] = []  # to be sent again
        self._saved = _Registers()
        self._mask = ctypes.create_string_buffer(8)
        self._at = 0

    def __enter__(self) -> Self:
        """Stop the process. Raises InjectionFailed."""
        if not is_possible():
            raise InjectionFailed("only known for x86-64")
        try:
            self._stopped.__enter__()
            ptrace(_GETREGS, self._pid, 0, ctypes.addressof(self._saved))
            if self._saved.cs != _CS_64:
                raise InjectionFailed("is not a 64-bit program")
            self._at = _system_call(self._pid)
            ptrace(_GETSIGMASK, self._pid, 8, ctypes.addressof(self._mask))
            ptrace(_SETSIGMASK, self._pid, 8, ctypes.addressof(ctypes.create_string_buffer(_ALL_SIGNALS, 8)))
        except (OSError, StopFailed, InjectionFailed) as error:
            self._release()
            raise InjectionFailed(str(error)) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for request, size, value in (
            (_SETREGS, 0, ctypes.addressof(self._saved)), (_SETSIGMASK, 8, ctypes.addressof(self._mask)),
        ):  # fmt: skip
            with contextlib.suppress(OSError):  # it was killed
                ptrace(request, self._pid, size, value)
        self._release()

    def call(self, number: int, *arguments: int) -> int:
        """Return what a system call returns in the process. Raises OSError with its errno, InjectionFailed."""
        registers = _Registers.from_buffer_copy(self._saved)
        registers.rip, registers.rax, registers.orig_rax = self._at, number, ctypes.c_ulong(-1).value
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(registers, name, value)
        ptrace(_SETREGS, self._pid, 0, ctypes.addressof(registers))
        for _ in range(_STEPS):
            ptrace(_SINGLESTEP, self._pid)
            status = self._wait()
            if status >> 8 == _SIGTRAP:
                break
            self._signals.append(os.WSTOPSIG(status))  # SIGSTOP, which cannot be blocked
        else:
            raise InjectionFailed("does not run a system call")
        ptrace(_GETREGS, self._pid, 0, ctypes.addressof(registers))
        value = ctypes.c_long(registers.rax).value
        if -4096 < value < 0:
            raise OSError(-value, os.strerror(-value))
        return value

    def _wait(self) -> int:
        try:
            return wait(self._pid, time.monotonic() + _TIMEOUT)
        except StopFailed as error:
            raise InjectionFailed(str(error)) from None

    def _release(self) -> None:
        self._stopped.__exit__(None, None, None)
        for number in self._signals:
            with contextlib.suppress(ProcessLookupError):  # it was killed
                os.kill(self._pid, number)


def _system_call(pid: int) -> int:
    """Return the address of a system-call instruction, which every vDSO has. Raises InjectionFailed, OSError."""
    with open(f"/proc/{pid}/maps") as maps:
        line = next((line for line in maps if line.endswith("[vdso]\n")), None)
    if line is None:
        raise InjectionFailed("has no vDSO")
    start, end = (int(value, 16) for value in line.split(None, 1)[0].split("-"))
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(start)
        found = (memory.read(end - start) or b"").find(_SYSCALL)
    if found < 0:
        raise InjectionFailed("its vDSO makes no system call")
    return start + found
