"""What `create` and `exec` share: they pass descriptors to and from the process that they set up."""

from __future__ import annotations

import os
import sys

from runtime import sync
from runtime.errors import ContainerError, StartFailed, unwritable
from runtime.limits import HANDSHAKE_TIMEOUT
from runtime.linux import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from runtime.spec.config import Spec


def await_ready(ours: socket.socket, spec: Spec, pid: int, state: dict[str, Any], what: str) -> None:
    """Wait until the other side, process `pid`, is set up; pass a listener of its filter to the bundle's agent.

    `state` is the container's, in the form of the specification.
    """
    message = sync.receive(ours, HANDSHAKE_TIMEOUT, what)
    if "listener" in message and spec.seccomp is not None:
        from runtime.seccomp import load as seccomp_load

        agent = spec.seccomp.listener_path or ""
        fd = seccomp_load.take_listener(pid, int(message["listener"]))
        try:
            seccomp_load.send_listener(agent, fd, pid, state, metadata=spec.seccomp.listener_metadata)
        finally:
            os.close(fd)
        sync.tell(ours, {})
        sync.receive(ours, HANDSHAKE_TIMEOUT, what)


def compile_filter(spec: Spec) -> Any:
    """Return the seccomp filter of a bundle for the process that loads it; None without one. Raises NotSupported."""
    if spec.seccomp is None:
        return None
    from runtime.init.program import Filter
    from runtime.seccomp import filter as seccomp_filter

    return Filter(seccomp_filter.compile(spec.seccomp), spec.seccomp.load_flags, spec.seccomp.notifies)


def connect_console(path: str) -> socket.socket:
    """Connect to a --console-socket. Raises StartFailed."""
    try:
        return sync.connect(path)
    except OSError as error:
        raise StartFailed(f"--console-socket {path}: {error.strerror}") from None


def receive_master(sock: socket.socket) -> int:
    """Receive the master that init/console.py sends, and close the connection. Raises StartFailed."""
    from runtime.light import sockets

    sock.settimeout(HANDSHAKE_TIMEOUT)
    try:
        _, ancillary, _, _ = sock.recvmsg(64, sockets.CMSG_SPACE(4), sockets.MSG_CMSG_CLOEXEC)
    except OSError:
        ancillary = []
    finally:
        sock.close()
    if not ancillary:
        raise StartFailed("process.terminal: the container sent no terminal")
    return int.from_bytes(ancillary[0][2][:4], sys.byteorder)


def write_pid(path: str, pid: int) -> None:
    """Write a pid file atomically. Raises ContainerError."""
    try:
        files.replace(path, b"%d" % pid, mode=0o666)
    except OSError as error:
        raise unwritable(path, error) from None


def send_pidfd(path: str, pid: int) -> None:
    """Send a pidfd of the container's init to the Unix socket at `path`. Raises ContainerError."""
    try:
        fd = os.pidfd_open(pid)
        try:
            sync.send_fd(path, fd, b"pidfd")
        finally:
            os.close(fd)
    except OSError as error:
        raise ContainerError(f"--pidfd-socket {path}: {error.strerror}") from None
