"""What containers may leave on this machine: mounts, cgroups, processes (and with them namespaces), state directories,
interfaces and tables of nf_tables.

Others may run containers at the same time: only what bears one of the test's own names is counted, the directory that
its state directory lies in among them. In a network namespace of the test's own everything is.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.cgroups.hierarchies import discover
from runtime.linux import syscalls

GRACE = 20.0  # seconds in which what is just ending must be gone
BRIDGE = "leaks0"


def leaks(root: Path, *names: str) -> frozenset[str]:
    """Everything of that kind that is there now, each with a name.

    `root` is a state directory, `names` are texts that the ids of its containers and their cgroups' paths have. Two of
    these are compared: what the second has and the first had not was left in between.
    """
    own = (*names, str(root.parent))
    found = [*_mounts(own), *_cgroups(own), *_processes(own), *_states(root), *_network()]
    return frozenset(found)


def left(before: frozenset[str], root: Path, *names: str) -> list[str]:
    """What has come since `before` and stays; returns at once when there is nothing."""
    found = leaks(root, *names) - before
    deadline = time.monotonic() + GRACE
    while found and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel reports the end of none of these but processes
        found &= leaks(root, *names)
    return sorted(found)


def _mounts(own: tuple[str, ...]) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [f"mount {line}" for line in lines if any(name in line for name in own)]


def _cgroups(own: tuple[str, ...]) -> list[str]:
    found = [path for hierarchy in discover() for path, _, _ in os.walk(hierarchy.mountpoint)]
    return [f"cgroup {path}" for path in found if any(name in path for name in own)]


def _processes(own: tuple[str, ...]) -> list[str]:
    """Processes whose command line or cgroup says that they are ours.

    A fork of the command line has its arguments, the monitor has the state directory in its own, and the container's
    program is in the container's cgroup. As long as they are there, so are their namespaces. A zombie has neither, and
    waits for whoever adopted it (process 1, which is nothing of ours).
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            argv = (process / "cmdline").read_bytes()
            text = argv.decode(errors="replace") + (process / "cgroup").read_text()
            if (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
        except OSError:
            continue  # it has ended meanwhile
        if any(name in text for name in own):
            found.append(f"process {process.name}: {argv[-300:].decode(errors='replace')!r}")
    return found


def _states(root: Path) -> list[str]:
    return [f"state {path}" for path in root.iterdir()] if root.is_dir() else []


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and whatever it starts, in a network namespace of its own with the bridge BRIDGE."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        for command in ("set lo up", f"add {BRIDGE} type bridge", f"set {BRIDGE} up"):
            subprocess.run(["ip", "link", *command.split()], check=True)
        yield
    finally:
        syscalls.setns(before, syscalls.CLONE_NEWNET)
        os.close(before)


def _network() -> Iterator[str]:
    """Interfaces, tables and other processes in the network namespace of this thread, where that is one of its own."""
    if f"{BRIDGE}:" not in Path("/proc/thread-self/net/dev").read_text():
        return
    ours = os.readlink("/proc/thread-self/ns/net")
    for command in ("ip -o link show", "nft list tables"):
        lines = subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout.splitlines()
        for line in lines:
            if line.startswith("table ") or line.split(": ")[1] not in ("lo", BRIDGE):
                yield f"{command.split()[0]} {line}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "ns/net") == ours and process.name != str(os.getpid()):
                yield f"process {process.name} in the test's network: {(process / 'cmdline').read_bytes()[-300:]!r}"
