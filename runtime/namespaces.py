"""Namespaces of a container: their flags, and what is set up in new ones."""

import fcntl
import os
import socket
import struct
from pathlib import Path

from runtime import syscalls
from runtime.errors import StartFailed
from runtime.spec import Spec

FLAGS = {
    "mount": syscalls.CLONE_NEWNS,
    "uts": syscalls.CLONE_NEWUTS,
    "ipc": syscalls.CLONE_NEWIPC,
    "network": syscalls.CLONE_NEWNET,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "pid": syscalls.CLONE_NEWPID,
}
# The names under /proc/PID/ns.
FILES = {"mount": "mnt", "uts": "uts", "ipc": "ipc", "network": "net", "cgroup": "cgroup", "pid": "pid"}

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def paths(pid: int) -> dict[str, str]:
    """Each namespace type and the file that stands for it, of a process."""
    return {kind: f"/proc/{pid}/ns/{name}" for kind, name in FILES.items()}


def enter(spec: Spec) -> None:
    """Join the namespaces that have a path and make the others. The pid namespace holds for children only."""
    for kind, path in spec.namespaces.items():
        if path is not None:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    syscalls.setns(fd, FLAGS[kind])
                finally:
                    os.close(fd)
            except OSError as error:
                raise StartFailed(f"linux.namespaces ({kind}): {path}: {error.strerror}") from None
    syscalls.unshare(sum(FLAGS[kind] for kind, path in spec.namespaces.items() if path is None))


def set_up(spec: Spec) -> None:
    """Inside new namespaces: host name, domain name, loopback, sysctl. Raises StartFailed naming the field."""
    new = [kind for kind, path in spec.namespaces.items() if path is None]
    for field, name, setter in (
        ("hostname", spec.hostname, syscalls.sethostname),
        ("domainname", spec.domainname, syscalls.setdomainname),
    ):
        if name is not None:
            if "uts" not in new:
                raise StartFailed(f"{field}: cannot be set without a new uts namespace")
            try:
                setter(name)
            except OSError as error:
                raise StartFailed(f"{field}: {error.strerror}") from None
    if "network" in new:
        bring_up("lo")
    for key, value in spec.sysctl.items():
        # kernel.* of ipc and uts namespaces, fs.mqueue.*, net.*: anything else would change the host.
        kind = _sysctl_namespace(key)
        if kind is None or kind not in new:
            raise StartFailed(f"linux.sysctl.{key}: is not separate for this container")
        try:
            Path("/proc/sys", *key.split(".")).write_text(value)
        except OSError as error:
            raise StartFailed(f"linux.sysctl.{key}: {error.strerror}") from None


def _sysctl_namespace(key: str) -> str | None:
    if "/" in key or ".." in key:
        return None
    if key.startswith("net."):
        return "network"
    if key.startswith(("kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue.")):
        return "ipc"
    return "uts" if key in ("kernel.hostname", "kernel.domainname") else None


def bring_up(interface: str) -> None:
    """Set an interface of our network namespace up (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = struct.pack("16sh14x", interface.encode(), 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", interface.encode(), flags | _IFF_UP))


def new_netns() -> int:
    """A descriptor of a new network namespace with loopback up; our own stays what it was.

    Must be called by a process without other threads.
    """
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        try:
            bring_up("lo")
            return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            syscalls.setns(before, syscalls.CLONE_NEWNET)
    finally:
        os.close(before)
