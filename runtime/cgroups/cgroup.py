"""Control groups of one container, on version 1, version 2, and the hybrid of both."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from runtime.cgroups import freezer, moving
from runtime.cgroups.hierarchies import (
    UNIFIED,
    below,
    discover,
    own,
    owner_of,
    remove_parents,
    remove_tree,
)
from runtime.errors import Conflict, ContainerError, StateError
from runtime.limits import CGROUP_KILL_TIMEOUT, CGROUP_REMOVE_TIMEOUT
from runtime.linux.files import flat_keyed, number_list, read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, Self

    from runtime.cgroups.hierarchies import Hierarchy
    from runtime.spec.resources import Resources
    from runtime.state.record import State


class Cgroup:
    """The directories of one container: `paths` maps a v1 controller, or "" for version 2, to its directory.

    `unit` is the name of the systemd unit if systemd made the cgroup, else None.
    """

    def __init__(self, paths: dict[str, str], unit: str | None = None) -> None:
        self.paths = paths
        self.unit = unit
        self._told: Resources | None = None  # what the unit was started with
        self._placeholder = 0
        self._lock = -1  # on the first directory, while it has no process yet
        self._claimed = paths  # what the state names, including directories of another container
        self._is_own = False  # seen by require_own

    @classmethod
    def of(cls, state: State) -> Self:
        """Return the cgroup of an existing container, without directories that now belong to another container.

        Paths can be reused: by the same id below another --root, by another bundle with the same cgroupsPath.
        """
        strangers = [path for path in state.cgroup_paths.values() if owner_of(path) not in (None, b"", state.owner)]
        paths = {key: path for key, path in state.cgroup_paths.items() if path not in strangers}
        cgroup = cls(paths, None if strangers else state.systemd_unit)
        cgroup._claimed = state.cgroup_paths
        return cgroup

    @classmethod
    def create(
        cls,
        container_id: str,
        cgroups_path: str | None,
        *,
        systemd: bool = False,
        resources: Resources | None = None,
        annotations: Mapping[str, str] | None = None,
        owner: bytes = b"",
    ) -> Self:
        """Make the container's directory below each mount point: `cgroups_path`, or /pymigrate/<id>.

        They are marked as owned by `owner` (see `of`).

        With `systemd` it is a unit of systemd's, `cgroups_path` is slice:prefix:name (by default
        system.slice:pymigrate:<id>). A scope is never empty, so a child of this process holds the place until
        `release_claim` is called. The unit gets the limits in `resources`, which `apply` must still be called for, and
        the properties in `annotations`.

        Raises ContainerError when one exists already with processes in it, or when there is no systemd.
        """
        hierarchies = discover()
        unit: str | None = None
        if systemd:
            from runtime.cgroups import systemd as driver

            name = driver.UnitName.parse(container_id, cgroups_path)
            placeholder = driver.hold_place()
            unified = all(UNIFIED in hierarchy.controllers for hierarchy in hierarchies)
            try:
                relative = driver.start(name, placeholder, resources, annotations or {}, unified=unified).strip("/")
            except BaseException:
                driver.end_place(placeholder)
                raise
            unit = name.unit
        elif cgroups_path is not None and ":" in cgroups_path:
            raise ContainerError(
                f"linux.cgroupsPath: {cgroups_path} names a systemd unit",
                remedy="call the runtime with --systemd-cgroup, or set a path",
            )
        else:
            relative = cls._relative(container_id, cgroups_path)
        paths: dict[str, str] = {}
        there: dict[str, str] = {}
        made: dict[str, bool] = {}
        cgroup = cls(paths, unit)
        if systemd:
            cgroup._told, cgroup._placeholder = resources, placeholder
        try:
            for hierarchy in hierarchies:
                path = f"{hierarchy.mountpoint.rstrip('/')}/{relative}"
                new = hierarchy.make(path) if systemd or made else cgroup._claim(hierarchy, path)
                made[path] = new
                for controller in hierarchy.controllers:
                    paths[controller] = path
                    if not new:
                        there[controller] = path
            if there and not systemd:
                cls(there).require_free()
            for path, new in made.items():
                own(path, owner, new=new or systemd)
        except BaseException as error:
            # Only what is new in other hierarchies is removed: another container uses the rest.
            used = there if isinstance(error, Conflict) else {}
            cls({key: path for key, path in paths.items() if key not in used}, unit).remove()
            cgroup.release_claim()
            if isinstance(error, OSError):
                raise ContainerError(f"cannot make the cgroup {error.filename}: {error.strerror}") from None
            raise
        return cgroup

    def _claim(self, hierarchy: Hierarchy, path: str) -> bool:
        """Make the first directory, and lock it until `release_claim`; returns whether it is new.

        Of two containers that are to have the same cgroup, and are made at the same time, one is refused: until there
        is a process in it, it looks free. Raises Conflict, OSError.
        """
        while True:
            new = hierarchy.make(path)
            try:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # its owner has just removed it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.stat(path), os.fstat(lock)):
                    self._lock, lock = lock, -1
                    return new
            except BlockingIOError:
                raise Conflict(
                    f"linux.cgroupsPath: another container that is being created uses {path}",
                    remedy="set it to another path",
                ) from None
            except FileNotFoundError:
                continue
            finally:
                if lock >= 0:
                    os.close(lock)

    @staticmethod
    def _relative(container_id: str, cgroups_path: str | None) -> str:
        return os.path.normpath((cgroups_path or f"/pymigrate/{container_id}").strip("/"))

    @classmethod
    def planned(cls, container_id: str, cgroups_path: str | None) -> dict[str, str]:
        """Return the paths that `create` will make without systemd."""
        relative = cls._relative(container_id, cgroups_path)
        return {
            controller: f"{hierarchy.mountpoint.rstrip('/')}/{relative}"
            for hierarchy in discover()
            for controller in hierarchy.controllers
        }

    def release_claim(self) -> None:
        """Unlock the cgroup and end the placeholder, because a process of the container is in it now."""
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a process forked meanwhile may still have the descriptor
            os.close(self._lock)
            self._lock = -1
        if self._placeholder:
            from runtime.cgroups import systemd as driver

            driver.end_place(self._placeholder)
            self._placeholder = 0

    def require_free(self) -> None:
        """Raise ContainerError if it has processes, or would freeze new ones."""
        busy = self.pids()
        problem = f"in use by process {busy[0]}" if busy else "frozen" if self.frozen else None
        if problem:
            raise Conflict(f"linux.cgroupsPath: {self.directories()[0]} is {problem}", remedy="set it to another path")

    def require_own(self) -> None:
        """Raise StateError unless these can be a container's cgroups: below a mount point, and without this process.

        The paths come from a state.json, and their processes are killed. A damaged file must not end this machine.
        """
        if self._is_own:
            return
        points = [hierarchy.mountpoint.rstrip("/") for hierarchy in discover()]
        for directory in self._claimed.values():
            below = any(directory.startswith(f"{point}/") for point in points) and directory not in points
            if not below or os.path.normpath(directory) != directory:
                raise StateError(f"cgroup_paths: {directory} is not the cgroup of a container")
        if not {1, os.getpid()}.isdisjoint(self.pids()):
            raise StateError(
                f"cgroup_paths: {self.directories()[0]} holds processes of the host, this one or process 1"
            )
        self._is_own = True

    def directories(self) -> list[str]:
        """Return each directory once."""
        return list(dict.fromkeys(self.paths.values()))

    def add(self, pid: int, *, near: int | None = None) -> None:
        """Move a process in; 0 is the caller. Raises ContainerError.

        `near` is a process of the container. A version 2 cgroup that has enabled controllers for its children takes no
        processes itself; `pid` then joins the cgroup of that process.
        """
        for directory in self.directories():
            try:
                write(f"{directory}/{moving.entrance(self.paths, directory, pid)}", str(pid))
            except OSError as error:
                if error.errno != errno.EBUSY or near is None or directory != self.paths.get(UNIFIED):
                    raise moving.not_taken(directory, pid, error) from None
                moving.move_in(moving.unified_of(near, directory), pid, "cgroup.procs")

    def enter_but_unified(self) -> int:
        """Move the caller in, except on version 2. Return a descriptor of that directory for fork_into, -1 without one.

        Raises ContainerError.
        """
        paths = {controller: path for controller, path in self.paths.items() if controller != UNIFIED}
        type(self)(paths).add(0)
        if UNIFIED not in self.paths:
            return -1
        try:
            return os.open(self.paths[UNIFIED], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise moving.not_taken(self.paths[UNIFIED], 0, error) from None

    def apply(self, resources: Resources) -> None:
        """Set these limits. Raises ContainerError naming the field of config.json and the file."""
        if self.unit is not None and resources is not self._told:
            from runtime.cgroups import systemd as driver

            driver.set_properties(self.unit, resources, self.paths[UNIFIED] if self.unified_only else None)
        from runtime.cgroups import limits

        limits.apply(self.paths, resources)

    @property
    def unified_only(self) -> bool:
        return set(self.paths) == {UNIFIED}

    @property
    def frozen(self) -> bool:
        """Whether the freezer has frozen the processes."""
        return freezer.is_frozen(self.paths)

    def freeze(self) -> None:
        """Freeze all processes and wait for it; thaws them on failure. Raises ContainerError, DeadlineExceeded."""
        self.require_own()
        freezer.freeze(self.paths)

    def hold(self) -> None:
        """Freeze the processes without waiting: traced ones freeze when they are released. Raises ContainerError."""
        self.require_own()
        freezer.hold(self.paths)

    def thaw(self) -> None:
        """Thaw the processes. Raises ContainerError."""
        freezer.thaw(self.paths)

    def pids(self) -> list[int]:
        """Return all processes in it and below it."""
        found: set[int] = set()
        for directory in self.directories():
            for group in below(directory):
                try:
                    found.update(map(int, read(f"{group}/cgroup.procs").split()))
                except OSError:  # it has just been removed, or it is threaded and its processes count for its parent
                    continue
        found.discard(0)  # processes outside of our pid namespace
        return sorted(found)

    def signal(self, number: int) -> None:
        """Send a signal to every process in it. Raises StateError."""
        self.require_own()
        for pid in self.pids():
            _kill(pid, number)

    def kill(self) -> None:
        """Send SIGKILL to every process in it, including those forked meanwhile. Raises StateError."""
        self.require_own()
        deadline = time.monotonic() + CGROUP_KILL_TIMEOUT
        while pids := self.pids():
            self._kill_all(pids)
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)

    def _kill_all(self, pids: list[int]) -> None:
        if self.frozen:
            self.thaw()  # a process in a frozen version 1 cgroup does not die
        try:
            write(f"{self.paths[UNIFIED]}/cgroup.kill", "1")  # since Linux 5.14
        except (KeyError, OSError):
            for pid in pids:
                _kill(pid)

    def remove(self) -> None:
        """Remove the directories, and those parents that we have made and that are empty.

        Raises DeadlineExceeded, StateError.
        """
        self.release_claim()
        self.require_own()
        from runtime.cgroups import monitor as monitor_cgroup

        directories = self.directories()
        if self.unit is not None:
            from runtime.cgroups import systemd as driver

            driver.stop(self.unit, driver.monitor_unit(self.unit))
        deadline = time.monotonic() + CGROUP_REMOVE_TIMEOUT
        for directory, monitors in zip(directories, monitor_cgroup.directories(self), strict=True):
            remove_tree(directory, deadline)
            remove_tree(monitors, deadline)
            remove_parents(directory)

    def processors(self) -> frozenset[int]:
        """Return the processors that its processes may use; none without a cpuset."""
        for key, name in (("cpuset", "cpuset.effective_cpus"), (UNIFIED, "cpuset.cpus.effective")):
            try:
                return frozenset(number_list(read(f"{self.paths[key]}/{name}")))
            except (KeyError, OSError):
                continue
        return frozenset()

    def limits_reached(self) -> list[str]:
        """Return which of "memory" and "pids" the kernel has enforced here, by a kill or by refusing a fork."""
        found = []
        for kind, v1_file, v2_file, keys in (
            ("memory", "memory.oom_control", "memory.events", ("oom_kill", "under_oom")),
            ("pids", "pids.events", "pids.events", ("max",)),
        ):
            directory, file = (self.paths[kind], v1_file) if kind in self.paths else (self.paths.get(UNIFIED), v2_file)
            try:
                counts = flat_keyed(read(f"{directory}/{file}"))
            except OSError:
                continue  # no such controller here
            if any(counts.get(key) for key in keys):
                found.append(kind)
        return found

    def stats(self) -> dict[str, Any]:
        """Return usage and limits in the shape of `runc events --stats`."""
        from runtime.cgroups.stats import stats

        return stats(self.paths)

    def oom_events(self, interval: float | None = None) -> Iterator[bool]:
        """Yield True when the kernel runs out of memory here, False every `interval` seconds, until all have exited."""
        from runtime.cgroups.stats import oom_events

        return oom_events(self, interval)


def _kill(pid: int, number: int = 9) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
