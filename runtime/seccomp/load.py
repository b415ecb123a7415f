"""Load init's seccomp filter, and pass the listener of SCMP_ACT_NOTIFY to its agent.

parent                                  init
spec.seccomp.parse, filter.compile
  | ---- program ----------------------> |
  |                                      load
  | <--- the listener's number, by write |    only with SCMP_ACT_NOTIFY: the filter applies to init already,
  take_listener, send_listener           |    so init relies on no system call but write(2)
  | ---- a byte -----------------------> |    the listener is close-on-exec, so init waits for this before exec
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
    """Apply the filter to this process for good; with `listener` return the listener's descriptor (close-on-exec).

    From here on the filter restricts the caller too. Needs no_new_privs or CAP_SYS_ADMIN. Raises StartFailed.
    """
    try:
        fd = syscalls.seccomp_set_filter(
            program, flags | syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER if listener else flags
        )
    except OSError as error:
        why = {
            errno.EACCES: "needs process.noNewPrivileges or CAP_SYS_ADMIN",
            errno.EBUSY: "the process has a filter with a listener already, and the kernel allows only one",
        }.get(error.errno or 0, error.strerror)
        raise StartFailed(f"config.json: linux.seccomp: {why}") from None
    return fd if listener else None


def take_listener(pid: int, number: int) -> int:
    """Return the parent's duplicate of init's descriptor `number`; `pid` is init's. Raises StartFailed."""
    try:
        return syscalls.duplicate(pid, number)
    except OSError as error:
        raise StartFailed(
            f"config.json: linux.seccomp: cannot duplicate the listener of init: {error.strerror}"
        ) from None


def send_listener(path: str, fd: int, pid: int, state: dict[str, Any], *, metadata: str | None = None) -> None:
    """Send the listener `fd` to the agent at the Unix stream socket `path`, with the "container process state".

    `pid` is the filtered process, `state` the container's OCI state. The connection is closed afterwards. Raises
    StartFailed.
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
