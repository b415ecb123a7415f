"""Have a process stand still for a moment by ptrace(2), without its notice.

All its threads are stopped. The kernel releases them if the tracer dies, which the freezer of a cgroup would not do.
Stopping costs some 50 us, and 20 us for each thread. A thread that is frozen, or that waits for a disk or for the child
of a vfork(2), does not stop in time: `Stopped` fails then.

ptrace(2) knows tracers by thread. Run everything in a thread of its own by `apart`: when it ends the kernel releases
what did not stop in time, too. Otherwise such a thread of the process would stop later, and stay so.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.restype = ctypes.c_long
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_CONT, _DETACH, _SEIZE, _INTERRUPT = 7, 17, 0x4206, 0x4207
_WALL, _STOP_EVENT = 0x40000000, 128

_T = TypeVar("_T")


class StopFailed(Exception):
    """A process does not stop, and runs on. `str` says why."""


class Stopped:
    """A process that stands still. A context manager: leaving it lets the process continue."""

    def __init__(self, pid: int, timeout: float, options: int = 0) -> None:
        """All threads must stop in `timeout` seconds; `options` are ptrace(2)'s."""
        self._pid, self._timeout, self._options = pid, timeout, options
        self._threads: list[int] = []

    def __enter__(self) -> Self:
        """Stop every thread, the first one first. Raises StopFailed, OSError."""
        try:
            self._stop_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in reversed(self._threads):
            with contextlib.suppress(OSError):  # it has exited, or does not stop: it is released when this thread ends
                ptrace(_DETACH, thread)
        self._threads.clear()

    def _stop_all(self) -> None:
        deadline = time.monotonic() + self._timeout
        self._stop(self._pid, deadline)
        while new := [int(name) for name in os.listdir(f"/proc/{self._pid}/task") if int(name) not in self._threads]:
            for thread in new:
                with contextlib.suppress(ProcessLookupError):  # it has exited
                    self._stop(thread, deadline)
            if time.monotonic() > deadline:
                raise StopFailed("its threads do not stop")

    def _stop(self, thread: int, deadline: float) -> None:
        ptrace(_SEIZE, thread, 0, self._options)
        self._threads.append(thread)
        ptrace(_INTERRUPT, thread)
        while (status := wait(thread, deadline)) >> 16 != _STOP_EVENT:
            ptrace(_CONT, thread, 0, os.WSTOPSIG(status))  # it was about to take a signal


def standing_still(pid: int, timeout: float, action: Callable[[], _T], otherwise: Callable[[], _T]) -> _T:
    """Return what `action` returns while a process stands still, or what `otherwise` returns if it does not stop.

    Raises OSError.
    """

    def act() -> _T:
        with Stopped(pid, timeout):
            return action()

    try:
        return apart(act)
    except (StopFailed, PermissionError):  # the latter: a debugger has it, or a thread that is about to exit
        return otherwise()


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    """Raises OSError."""
    if _LIBC.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (ptrace {request:#x})")


def wait(thread: int, deadline: float) -> int:
    """Return the status of a thread that stops before the deadline (time.monotonic()). Raises StopFailed, OSError."""
    while True:
        found, status = os.waitpid(thread, _WALL | os.WNOHANG)
        if found and os.WIFSTOPPED(status):
            return status
        if found:
            raise StopFailed("has exited")
        if time.monotonic() > deadline:
            raise StopFailed("does not stop")
        time.sleep(0)


def apart(action: Callable[[], _T]) -> _T:
    """Return what `action` returns, or raise what it raises, in a thread of its own."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="tracer")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
