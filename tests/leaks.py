"""What containers may leave on this machine: mounts, cgroups, processes (and with them namespaces), state directories.

Others may run containers at the same time: only what bears one of the test's own names is counted, the directory that
its state directory lies in among them.
"""

import os
import time
from pathlib import Path

from runtime.cgroups.hierarchies import discover

GRACE = 5.0  # seconds in which what is just ending must be gone


def leaks(root: Path, *names: str) -> frozenset[str]:
    """Everything of that kind that is there now, each with a name.

    `root` is a state directory, `names` are texts that the ids of its containers and their cgroups' paths have. Two of
    these are compared: what the second has and the first had not was left in between.
    """
    own = (*names, str(root.parent))
    found = [*_mounts(own), *_cgroups(own), *_processes(own), *_states(root)]
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
