"""The child side of `exec`: joins a container's cgroup and namespaces, forks into its pid namespace, execs.

The first process stays outside, waits for the program and ends as it did. Runs under `python3 -I -S`.
"""

import os
import signal
import socket
import sys
from typing import Any

from runtime import process, processes, sync, syscalls
from runtime.cgroups import Cgroup
from runtime.errors import Conflict
from runtime.namespaces import FILES, FLAGS
from runtime.spec import Process, Rlimit

_STEP_TIMEOUT = 60.0


def _process(value: dict[str, Any]) -> Process:
    """The dataclass from its JSON form; it was checked where it was read."""
    capabilities = value["capabilities"]
    return Process(
        **{
            **value,
            "args": tuple(value["args"]),
            "env": tuple(value["env"]),
            "additional_gids": tuple(value["additional_gids"]),
            "rlimits": tuple(Rlimit(**limit) for limit in value["rlimits"]),
            "capabilities": capabilities and {name: frozenset(names) for name, names in capabilities.items()},
        }
    )


def _join(pid: int, start_time: int) -> None:
    """Enter every namespace of the container's init that is not ours already."""
    pidfd = os.pidfd_open(pid)
    if processes.start_time(pid) != start_time:
        raise Conflict("container not running")
    flags = 0
    for kind, name in FILES.items():
        if os.stat(f"/proc/{pid}/ns/{name}").st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
            flags |= FLAGS[kind]
    # CRIU gives restored containers a time namespace, so that their monotonic clock goes on.
    if os.stat(f"/proc/{pid}/ns/time").st_ino != os.stat("/proc/self/ns/time").st_ino:
        flags |= syscalls.CLONE_NEWTIME
    syscalls.setns(pidfd, flags)
    os.close(pidfd)


def main(argv: list[str]) -> int:
    """argv: the number of the handshake's descriptor."""
    sock = socket.socket(fileno=int(argv[0]))
    try:
        sock.set_inheritable(False)
        config = sync.receive(sock, _STEP_TIMEOUT, "exec")["config"]
        wanted = _process(config["process"])
        Cgroup(config["cgroups"]).add(0)
        _join(config["pid"], config["start_time"])
        pid = os.fork()
        if pid:
            return _wait(pid, sock, detach=config["detach"])
        sync.receive(sock, _STEP_TIMEOUT, "exec")
        if config["detach"]:
            os.setsid()
        process.limit_self(wanted)
        process.enter_cwd(wanted)
        program = process.find_program(wanted)
        process.become_user(wanted)
        sync.send(sock, {"ready": True})
        process.execute(wanted, program)
    except BaseException as error:
        text = str(error) if hasattr(error, "kind") or isinstance(error, OSError) else f"exec: {error!r}"
        try:
            sync.send(sock, {"error": text})
        except OSError:
            print(text, file=sys.stderr)
    os._exit(1)


def _wait(pid: int, sock: socket.socket, *, detach: bool) -> int:
    """In the process that stays outside: tell the program's pid, wait for it, end as it did."""
    sync.send(sock, {"pid": pid})
    sock.close()
    if detach:
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # `exec` forwards them to the program
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1:])
