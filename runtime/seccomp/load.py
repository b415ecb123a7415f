"""Putting init under its seccomp filter, and getting the listener of SCMP_ACT_NOTIFY to its agent.

parent                                  init
seccomp.parse, seccomp_filter.compile
  | ---- program ----------------------> |
  |                                      load
  | <--- the listener's number, by write |    only with SCMP_ACT_NOTIFY: the filter rules init already,
  take_listener, send_listener           |    so no call but write(2) is relied on
  | ---- a byte -----------------------> |    the listener is close-on-exec: no exec before this
  |                                      exec
"""

from __future__ import annotations

import errno

from runtime.errors import StartFailed
from runtime.limits import SECCOMP_AGENT_TIMEOUT
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def load(program: bytes, flags: int, *, listener: bool) -> int | None:
    """Put this process under the filter for good; returns the listener's descriptor (close-on-exec) if asked for.

    From here on the filter rules the caller as well. Needs no_new_privs or CAP_SYS_ADMIN. Raises StartFailed.
    """
    try:
        fd = syscalls.seccomp_set_filter(
            program, flags | syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER if listener else flags
        )
    except OSError as error:
        why = {
            errno.EACCES: "needs process.noNewPrivileges or CAP_SYS_ADMIN",
            errno.EBUSY: "this process is under a filter with a listener already, and the kernel allows one",
        }.get(error.errno or 0, error.strerror)
        raise StartFailed(f"config.json: linux.seccomp: {why}") from None
    return fd if listener else None


def take_listener(pid: int, number: int) -> int:
    """The parent's copy of the descriptor `number` of init, which the parent sees as `pid`. Raises StartFailed."""
    try:
        return syscalls.duplicate(pid, number)
    except OSError as error:
        raise StartFailed(
            f"config.json: linux.seccomp: cannot take the listener out of init: {error.strerror}"
        ) from None


def send_listener(path: str, fd: int, pid: int, state: dict[str, Any], *, metadata: str | None = None) -> None:
    """Give the listener `fd` to the agent at the Unix stream socket `path` with the "container process state".

    `pid` is the process under the filter, `state` the container's OCI state. One connection, closed after it.
    Raises StartFailed.
    """
    import json
    import socket

    message: dict[str, Any] = {"ociVersion": state["ociVersion"], "fds": ["seccompFd"], "pid": pid}
    if metadata is not None:
        message["metadata"] = metadata
    data = json.dumps(message | {"state": state}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
        agent.settimeout(SECCOMP_AGENT_TIMEOUT)
        try:
            agent.connect(path)
            sent = socket.send_fds(agent, [data], [fd])
            agent.sendall(data[sent:])
        except OSError as error:
            raise StartFailed(f"config.json: linux.seccomp.listenerPath: {path}: {error.strerror or error}") from None
