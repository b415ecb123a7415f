"""Control groups of one container, on version 1, version 2, and the hybrid of both."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from runtime.cgroups import v1, v2
from runtime.cgroups.hierarchies import UNIFIED, discover, inherit_cpuset
from runtime.errors import ContainerError, DeadlineExceeded
from runtime.spec import Resources

REMOVE_TIMEOUT = 10.0
_MONITOR = "@monitor"  # a character that no id has: it cannot be the cgroup of another container


class Cgroup:
    """The directories of one container: `paths` maps a v1 controller, or "" for version 2, to its directory."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths

    @classmethod
    def create(cls, container_id: str, cgroups_path: str | None) -> Self:
        """Make the container's directory below each mount point: `cgroups_path`, or /pymigrate/<id>.

        Raises ContainerError when one exists already with processes in it.
        """
        relative = (cgroups_path or f"/pymigrate/{container_id}").strip("/")
        paths: dict[str, str] = {}
        try:
            for hierarchy in discover():
                path = hierarchy.mountpoint / relative
                hierarchy.make(path)
                for name in hierarchy.controllers:
                    paths[name] = str(path)
        except OSError as error:
            cls(paths).remove()
            raise ContainerError(f"cannot make the cgroup {error.filename}: {error.strerror}") from None
        busy = cls(paths).pids()
        if busy:
            raise ContainerError(
                f"the cgroup {relative} is in use by process {busy[0]}", remedy="set linux.cgroupsPath to another path"
            )
        return cls(paths)

    def directories(self) -> list[str]:
        """Each directory once."""
        return list(dict.fromkeys(self.paths.values()))

    def add(self, pid: int) -> None:
        """Move a process in; 0 is the caller. Raises ContainerError."""
        for directory in self.directories():
            _move_in(directory, pid)

    def add_monitor(self, pid: int) -> None:
        """Move the container's monitor into a cgroup beside this one. Raises ContainerError.

        It must not stay where its starter was: a service manager may end all of that (a log-in session, sshd's unit),
        and a container whose monitor is gone dies of a broken pipe.
        """
        for directory in self.directories():
            beside = Path(directory + _MONITOR)
            beside.mkdir(mode=0o755, exist_ok=True)
            if self.paths.get("cpuset") == directory:
                inherit_cpuset(beside)
            _move_in(str(beside), pid)

    def apply(self, resources: Resources) -> None:
        """Set the limits. Raises ContainerError naming the field of config.json and the file."""
        writes = v2.writes(resources) if self.unified_only else v1.writes(resources)
        for field, controller, file, value in writes:
            directory = self.paths.get(controller)
            if directory is None:
                raise ContainerError(f"linux.resources.{field}: this host has no {controller or 'version 2'} cgroup")
            try:
                _write(os.path.join(directory, file), value)
            except FileNotFoundError:
                raise ContainerError(
                    f"linux.resources.{field}: there is no {file} in {directory}",
                    remedy="the kernel lacks that controller, or (version 2) it is not delegated to that cgroup",
                ) from None
            except OSError as error:
                raise ContainerError(
                    f"linux.resources.{field}: cannot write {value!r} to {file}: {error.strerror}"
                ) from None

    @property
    def unified_only(self) -> bool:
        return set(self.paths) == {UNIFIED}

    @property
    def frozen(self) -> bool:
        """Whether the processes are paused by the freezer."""
        with contextlib.suppress(OSError):
            if "freezer" in self.paths:
                return Path(self.paths["freezer"], "freezer.state").read_text().strip() != "THAWED"
            if UNIFIED in self.paths:
                return Path(self.paths[UNIFIED], "cgroup.freeze").read_text().strip() == "1"
        return False

    def freeze(self) -> None:
        self._freezer("FROZEN", "1")

    def thaw(self) -> None:
        self._freezer("THAWED", "0")

    def _freezer(self, v1_state: str, v2_state: str) -> None:
        if "freezer" in self.paths:
            Path(self.paths["freezer"], "freezer.state").write_text(v1_state)
        elif UNIFIED in self.paths:
            Path(self.paths[UNIFIED], "cgroup.freeze").write_text(v2_state)
        else:
            raise ContainerError("this host has no freezer cgroup")

    def pids(self) -> list[int]:
        """All processes in it and below it."""
        found: set[int] = set()
        for directory in self.directories():
            for procs in _below(directory):
                with contextlib.suppress(OSError):
                    found |= {int(line) for line in Path(procs, "cgroup.procs").read_text().split()}
        return sorted(found)

    def kill(self) -> None:
        """Send SIGKILL to every process in it; one that forks meanwhile is caught by the next round."""
        with contextlib.suppress(OSError):
            self.thaw()
        for _ in range(100):
            pids = self.pids()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            time.sleep(0.01)

    def remove(self) -> None:
        """Remove the directories, and our own parent when it is empty. Raises DeadlineExceeded."""
        deadline = time.monotonic() + REMOVE_TIMEOUT
        for directory in self.directories():
            remove_tree(directory, deadline)
            remove_tree(directory + _MONITOR, deadline)
            parent = Path(directory).parent
            if parent.name == "pymigrate":
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _write(path: str, value: str) -> None:
    """Unlike a plain open() this does not ask for the file to be made, which the kernel answers with EACCES."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _move_in(directory: str, pid: int) -> None:
    try:
        _write(os.path.join(directory, "cgroup.procs"), str(pid))
    except OSError as error:
        raise ContainerError(f"{directory}: cannot take process {pid}: {error.strerror}") from None


def remove_tree(directory: str, deadline: float) -> None:
    """Remove a cgroup and all below it; harmless when it is gone. Raises DeadlineExceeded at `deadline` (monotonic)."""
    for path in sorted(_below(directory), key=len, reverse=True):
        while True:
            try:
                os.rmdir(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                # A process that has just died is still counted for a moment.
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"the cgroup {path} cannot be removed: {error.strerror}") from None
                time.sleep(0.005)
                continue
            break


def _below(directory: str) -> Iterable[str]:
    """The directory and all cgroups below it."""
    return [path for path, _, _ in os.walk(directory)]
