"""What containers may leave on this machine: mounts, cgroups, namespaces, processes, state directories.

Where others run containers at the same time, PYMIGRATE_SHARED=1 counts only what bears the test's own names.
"""

import os
import time
from pathlib import Path

from runtime.cgroups.hierarchies import discover

GRACE = 5.0  # seconds in which what is just ending must be gone
_MODULES = (b"from runtime.", b"from migrate.")  # selfexec.command's processes: monitor, init, exec, criu
_LAB = "/pymigrate-lab"  # a lab's hosts have cgroups of their own; they are not this test's


def leaks(root: Path, own: str) -> frozenset[str]:
    """Everything of that kind that is there now, each with a name.

    `root` is a state directory, `own` a text that the ids of its containers have. Two of these are compared: what the
    second has and the first had not was left in between.
    """
    found = [*_mounts(), *_cgroups(), *_processes(root), *_states(root)]
    if os.environ.get("PYMIGRATE_SHARED"):
        found = [line for line in found if own in line or str(root.parent) in line]
    return frozenset(found)


def left(before: frozenset[str], root: Path, own: str) -> list[str]:
    """What has come since `before` and stays; returns at once when there is nothing."""
    found = leaks(root, own) - before
    deadline = time.monotonic() + GRACE
    while found and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel reports the end of none of these but processes
        found &= leaks(root, own)
    return sorted(found)


def _mounts() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [f"mount {fields[0]} at {fields[4]}" for fields in map(str.split, lines)]


def _cgroups() -> list[str]:
    found = [path for hierarchy in discover() for path, _, _ in os.walk(hierarchy.mountpoint)]
    return [f"cgroup {path}" for path in found if _LAB not in path]


def _processes(root: Path) -> list[str]:
    """Processes that run a module of ours or were forked from a verb, and every process's namespaces."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if _LAB in (process / "cgroup").read_text():
                continue
            argv = (process / "cmdline").read_bytes()
            if any(word in argv for word in (*_MODULES, os.fsencode(root))):
                found.add(f"process {process.name}: {argv[-300:].decode(errors='replace')!r}")
            found |= {f"namespace {os.readlink(link)}" for link in (process / "ns").iterdir()}
        except OSError:
            continue  # it has ended meanwhile
    return sorted(found)


def _states(root: Path) -> list[str]:
    return [f"state {path}" for path in root.iterdir()] if root.is_dir() else []
