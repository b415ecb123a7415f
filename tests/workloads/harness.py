"""The first process of a container that runs checkers: one child for each kind of thing that a container can hold.

    python3 -I -S /programs/main.py KIND...

A kind is a generator function: what comes before its first `yield` sets its thing up, each further step checks that it
is as it was. Each child says "KIND ready" on stdout, or "KIND skipped: why" where this kernel does not let it be made;
whenever the first process gets SIGUSR1 it says "KIND ok", or "KIND failed: what" of what it finds.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator

Kind = Callable[[], Iterator[None]]
KINDS: dict[str, Kind] = {}
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Skip(Exception):
    """This kernel, or the container's privileges, do not let the thing be made."""


def kind(function: Kind) -> Kind:
    KINDS[function.__name__.replace("_", "-")] = function
    return function


def call(name: str, *args: object) -> int:
    """A function of libc; raises OSError."""
    function = getattr(libc, name)
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    result = int(function(*[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def make(name: str, *args: object) -> int:
    """The same for what a kernel may lack or forbid: Skip instead of OSError."""
    try:
        return call(name, *args)
    except OSError as error:
        raise Skip(str(error)) from None


def equal(found: object, expected: object, what: str = "") -> None:
    if found != expected:
        raise AssertionError(f"{what + ': ' if what else ''}{found!r}, not {expected!r}")


def near(found: float, expected: float, within: float, what: str) -> None:
    if abs(found - expected) > within:
        raise AssertionError(f"{what}: {found:.3f}, not {expected:.3f}")


def child(program: Callable[[], object], *, ready: bool = True) -> int:
    """Fork a process that runs `program` and ends; with `ready` return when it has written to descriptor `READY`."""
    global READY
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        READY = writer
        code = 1
        try:
            program()
            code = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        os._exit(code)
    os.close(writer)
    if ready and not os.read(reader, 1):
        os.waitpid(pid, 0)
        raise Skip("the process could not set it up")
    os.close(reader)
    return pid


READY = -1


def say_ready() -> None:
    os.write(READY, b"r")
    os.close(READY)


def elsewhere(test: Callable[[], object]) -> bool:
    """Whether `test` is true in another process."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if test() else 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 2:
        raise AssertionError("the other process failed")
    return code == 0


def _say(text: str) -> None:
    os.write(1, (" ".join(text.split()) + "\n").encode())


def _one(name: str, commands: int) -> None:
    try:
        steps = KINDS[name]()
        next(steps)
    except Skip as reason:
        _say(f"{name} skipped: {reason}")
        signal.pause()
    except BaseException as error:
        _say(f"{name} broken: {error!r}")
        raise
    _say(f"{name} ready")
    while os.read(commands, 1):
        try:
            next(steps)
        except BaseException as error:
            _say(f"{name} failed: {error or type(error).__name__}")
            signal.pause()
        _say(f"{name} ok")


def run(names: list[str]) -> None:
    signals = {signal.SIGUSR1, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pipes: list[int] = []
    for name in names:
        reader, writer = os.pipe()
        if os.fork() == 0:
            for fd in [writer, *pipes]:
                os.close(fd)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            try:
                _one(name, reader)
            finally:
                os._exit(1)
        os.close(reader)
        pipes.append(writer)
    while True:
        if signal.sigwait(signals) == signal.SIGUSR1:
            for writer in pipes:
                os.write(writer, b"c")
            continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
