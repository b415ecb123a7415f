"""Becoming the program of the container: identity, limits, capabilities, and exec. Runs inside its namespaces."""

import errno
import os
import resource
import signal
from pathlib import Path
from typing import NoReturn

from runtime import capabilities, syscalls
from runtime.errors import StartFailed
from runtime.spec import Process

_INFINITE = 2**64 - 1


def limit_self(process: Process) -> None:
    """Set rlimits and the OOM score. Raises StartFailed naming the field."""
    for index, limit in enumerate(process.rlimits):
        soft, hard = (resource.RLIM_INFINITY if value == _INFINITE else value for value in (limit.soft, limit.hard))
        try:
            resource.setrlimit(getattr(resource, limit.type), (soft, hard))
        except (OSError, ValueError) as error:
            raise StartFailed(f"process.rlimits[{index}]: cannot set {limit.type}: {error}") from None
    if process.oom_score_adj is not None:
        try:
            Path("/proc/self/oom_score_adj").write_text(str(process.oom_score_adj))
        except OSError as error:
            raise StartFailed(f"process.oomScoreAdj: cannot be set: {error.strerror}") from None


def find_program(process: Process) -> str:
    """The path of args[0], looked up in the PATH of `env`. Raises StartFailed in the words that engines look for."""
    name = process.args[0]
    if "/" in name:
        candidates = [name if name.startswith("/") else os.path.join(process.cwd, name)]
    else:
        path = next((entry[5:] for entry in process.env if entry.startswith("PATH=")), os.defpath)
        candidates = [os.path.join(directory or ".", name) for directory in path.split(":")]
    denied = False
    for candidate in candidates:
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            denied = True
    if denied:
        raise StartFailed(f"process.args[0]: exec: {name!r}: permission denied")
    problem = "no such file or directory" if "/" in name else "executable file not found in $PATH"
    raise StartFailed(f"process.args[0]: exec: {name!r}: {problem}")


def enter_cwd(process: Process) -> None:
    """Change to `cwd`. Raises StartFailed."""
    try:
        os.chdir(process.cwd)
    except OSError as error:
        raise StartFailed(f"process.cwd: {process.cwd}: {error.strerror}") from None


def become_user(process: Process) -> None:
    """Change user and groups, capabilities and no_new_privs. Raises StartFailed naming the field."""
    try:
        if process.no_new_privileges:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        if process.capabilities is not None:
            capabilities.drop_bounding(process.capabilities["bounding"])
        capabilities.keep_over_setuid()
    except OSError as error:
        raise StartFailed(f"process.capabilities: {error.strerror}") from None
    try:
        capabilities.become(process.uid, process.gid, process.additional_gids)
    except OSError as error:
        raise StartFailed(f"process.user: cannot become {process.uid}:{process.gid}: {error.strerror}") from None
    if process.umask is not None:
        os.umask(process.umask)
    if process.capabilities is not None:
        try:
            capabilities.apply(process.capabilities)
        except OSError as error:
            raise StartFailed(f"process.capabilities: {error.strerror}") from None


def execute(process: Process, program: str) -> NoReturn:
    """exec, with the signals as a fresh process has them. Raises StartFailed."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # the interpreter ignores these, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execve(program, list(process.args), dict(entry.partition("=")[::2] for entry in process.env))
    except OSError as error:
        reason = "exec format error" if error.errno == errno.ENOEXEC else (error.strerror or "").lower()
        raise StartFailed(f"process.args[0]: exec: {process.args[0]!r}: {reason}") from None
