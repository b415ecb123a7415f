"""Where this host's cgroup hierarchies are mounted (proc_pid_mountinfo(5), cgroups(7))."""

from dataclasses import dataclass
from pathlib import Path

UNIFIED = ""
_V1 = frozenset(
    ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "net_cls", "net_prio", "hugetlb",
     "perf_event", "rdma", "misc")
)  # fmt: skip
# Version 2 controllers that a container's limits may need.
_WANTED = ("cpu", "cpuset", "memory", "pids", "io")


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy: `controllers` of version 1 (a named one as "name=systemd"), or (UNIFIED,).

    Containers live below its mount point, as runc's do: below our own cgroup they would end with a log-in session.
    """

    mountpoint: Path
    controllers: tuple[str, ...]

    def make(self, path: Path) -> None:
        """Make the cgroup `path` and, where that is needed, make it usable: cpuset values, delegated controllers."""
        for directory in reversed([path, *path.parents]):
            if directory.is_relative_to(self.mountpoint) and directory != self.mountpoint:
                directory.mkdir(mode=0o755, exist_ok=True)
                if "cpuset" in self.controllers:
                    inherit_cpuset(directory)
        if self.controllers == (UNIFIED,):
            for directory in reversed(path.parents):
                if directory.is_relative_to(self.mountpoint):
                    _delegate(directory)


def discover(mountinfo: str | None = None) -> list[Hierarchy]:
    """The hierarchies that this process sees; the text is for tests, by default that of /proc/self/mountinfo."""
    mountinfo = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    found: dict[tuple[str, ...], Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            controllers: tuple[str, ...] = (UNIFIED,)
        elif kind == "cgroup":
            controllers = tuple(name for name in options.split(",") if name in _V1 or name.startswith("name="))
        else:
            continue
        if controllers and controllers not in found:
            mountpoint = before.split()[4].encode().decode("unicode_escape")
            found[controllers] = Hierarchy(Path(mountpoint), controllers)
    return list(found.values())


def inherit_cpuset(directory: Path) -> None:
    """A new version 1 cpuset is empty, and no process may join it before it has processors and memory nodes."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not (directory / name).read_text().strip():
            (directory / name).write_text((directory.parent / name).read_text())


def _delegate(directory: Path) -> None:
    """Let children of a version 2 cgroup have its controllers; what is refused shows when a limit is set."""
    there = (directory / "cgroup.controllers").read_text().split()
    for name in _WANTED:
        if name in there:
            try:
                (directory / "cgroup.subtree_control").write_text(f"+{name}")
            except OSError:
                continue
