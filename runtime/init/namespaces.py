"""Enter the namespaces of a container's spec, and set up the new ones."""

from __future__ import annotations

import os

from runtime.errors import StartFailed
from runtime.linux import syscalls
from runtime.linux.namespaces import FILES, FLAGS, bring_up, open_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from runtime.spec.config import Spec

    T = TypeVar("T")


# Clocks as /proc/PID/timens_offsets numbers them (time_namespaces(7)).
_CLOCKS = {"monotonic": 1, "boottime": 7}


def enter(spec: Spec, map_ids: Callable[[], None], *, leave_out: str = "") -> frozenset[str]:
    """Join the namespaces that have a path and make the others. New pid and time namespaces apply to children only.

    A new one of the type `leave_out` is not made. `map_ids` is called in a new user namespace and returns when a
    process outside has written its maps. Return the types whose settings `set_up` may change, because they are not the
    host's. Raises StartFailed naming the type.
    """
    before = _settable()
    joined = {kind: path for kind, path in spec.namespaces.items() if path is not None}
    opened: dict[str, int] = {}
    try:
        for kind, path in joined.items():
            opened[kind] = open_path(kind, path)
            _refuse_sysctls(spec, kind, opened[kind])
        # Joining needs privileges over the namespace. Namespaces of the host are joined before the user namespace is
        # entered; those that belong to the user namespace, after it.
        later = [kind for kind in joined if kind != "user" and not _join(kind, opened[kind], "user" in opened)]
        if "user" in joined:
            _join("user", opened["user"], False)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        for kind in later:
            _join(kind, opened[kind], False)
    finally:
        for fd in opened.values():
            os.close(fd)
    new = {kind for kind, path in spec.namespaces.items() if path is None} - {leave_out}
    try:
        if "user" in new:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            map_ids()
        syscalls.unshare(sum(FLAGS[kind] for kind in new - {"user"}))
    except OSError as error:
        raise StartFailed(f"linux.namespaces: cannot make {', '.join(sorted(new))}: {error.strerror}") from None
    _set_clocks(spec)
    return frozenset(kind for kind, number in _settable().items() if number != before[kind])


def _settable() -> dict[str, int]:
    """Return the inodes of this process's namespaces with settings that config.json can change."""
    return {kind: os.stat(f"/proc/self/ns/{FILES[kind]}").st_ino for kind in ("uts", "ipc", "network")}


def _refuse_sysctls(spec: Spec, kind: str, fd: int) -> None:
    """Raise StartFailed if a sysctl would be set in a joined namespace that is the host's own."""
    there, ours = os.fstat(fd), os.stat(f"/proc/self/ns/{FILES[kind]}")
    if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
        for key in spec.sysctl:
            if _sysctl_namespace(key) == kind:
                raise StartFailed(
                    f"linux.sysctl.{key}: would change the host: the {kind} namespace to join is the host's"
                )


def _join(kind: str, fd: int, again: bool) -> bool:
    """Join a namespace; return False if that is not permitted yet and will be tried `again`."""
    try:
        syscalls.setns(fd, FLAGS[kind])
    except OSError as error:
        if isinstance(error, PermissionError) and again:
            return False
        raise StartFailed(f"linux.namespaces ({kind}): cannot be joined: {error.strerror}") from None
    return True


def _set_clocks(spec: Spec) -> None:
    """Set the new time namespace's clocks, before the first process enters it and fixes them."""
    for clock, (seconds, nanoseconds) in spec.time_offsets.items():
        try:
            with open("/proc/self/timens_offsets", "w") as file:
                file.write(f"{_CLOCKS[clock]} {seconds} {nanoseconds}\n")
        except OSError as error:
            raise StartFailed(f"linux.timeOffsets.{clock}: cannot be set: {error.strerror}") from None


def set_up(spec: Spec, separate: frozenset[str]) -> None:
    """Set host name, domain name, loopback and sysctls, in namespaces that are `separate` from the host's (`enter`).

    Raises StartFailed naming the field.
    """
    for field, name, setter in (
        ("hostname", spec.hostname, syscalls.sethostname),
        ("domainname", spec.domainname, syscalls.setdomainname),
    ):
        if name is not None:
            if "uts" not in separate:
                raise StartFailed(f"{field}: cannot be set: the container does not have its own uts namespace")
            try:
                setter(name)
            except OSError as error:
                raise StartFailed(f"{field}: {error.strerror}") from None
    if spec.is_new("network"):
        bring_up("lo")
    for key, value in spec.sysctl.items():
        # Only kernel.* of ipc and uts namespaces, fs.mqueue.* and net.*; anything else would change the host.
        dotted, slashed = _sysctl_names(key)
        if ".." in slashed or _sysctl_namespace(dotted) not in separate:
            raise StartFailed(f"linux.sysctl.{key}: would change the host: no namespace of this container holds it")
        try:
            with open(f"/proc/sys/{slashed}", "w") as file:
                file.write(value)
        except OSError as error:
            raise StartFailed(f"linux.sysctl.{key}: {error.strerror}") from None


def _sysctl_names(key: str) -> tuple[str, str]:
    """Return a sysctl's name with dots, and its path; in net/ipv4/conf/eth0.1 the dot belongs to the interface."""
    swapped = key.translate({46: "/", 47: "."})
    return (swapped, key) if key.replace(".", "/").find("/") == key.find("/") else (key, swapped)


def _sysctl_namespace(key: str) -> str | None:
    if key.startswith("net."):
        return "network"
    if key.startswith(("kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue.")):
        return "ipc"
    return "uts" if key in ("kernel.hostname", "kernel.domainname") else None
