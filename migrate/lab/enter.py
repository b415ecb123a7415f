"""Run a command in a host of a lab; also a program that imports little, for callers that do so often.

As a program it runs under `python3 -I -S`, as `enter PID CGROUP... -- CMD [ARG...]`; the command gets its environment.
"""

from __future__ import annotations

import os

from runtime.light import signals
from runtime.linux import namespaces, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_FORWARDED = (signals.SIGINT, signals.SIGTERM, signals.SIGHUP)


def namespace_flags() -> int:
    """Return the flags of the namespaces that each host has."""
    return sum(namespaces.FLAGS[kind] for kind in ("mount", "uts", "ipc", "network", "cgroup", "pid", "time"))


def enter(pid: int, cgroups: list[str], command: list[str], environment: Mapping[str, str]) -> int:
    """Run a command, with this process's stdio, in the host with the first process `pid` and these `cgroups`.

    Return its exit status: 128 + n for signal n, 127 if it does not exist. Raises OSError if the host is not up.
    """
    pidfd = os.pidfd_open(pid)
    for directory in cgroups:
        leaf = f"{directory}/init"
        with open(f"{leaf if os.path.isdir(leaf) else directory}/cgroup.procs", "w") as procs:
            procs.write("0")
    syscalls.setns(pidfd, namespace_flags())
    os.chdir("/")
    child = os.fork()
    if child == 0:
        try:
            for number in (*_FORWARDED, signals.SIGPIPE):
                signals.signal(number, signals.SIG_DFL)
            os.execvpe(command[0], command, environment)
        except OSError as error:
            os.write(2, f"pymigrate: error: {command[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(child, number)
        except ProcessLookupError:
            return  # it has just exited

    for number in _FORWARDED:
        signals.signal(number, forward)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    end = argv.index("--")
    return enter(int(argv[0]), argv[1:end], argv[end + 1 :], os.environ)
