"""Save the cgroups below a container's cgroup as a list, and make them again from it below another one.

    [{"controller": "pids", "path": "jobs/1", "owner": [uid, gid, mode], "files": {"pids.max": "10"},
      "owners": {"cgroup.procs": [uid, gid]}, "given": ["pids"], "threads": [7]}, ...]

Parents come before children. `threads` are the ids, inside the container, of the processes (version 1: threads) in it,
`given` the controllers enabled for its children (version 2). The container's own cgroup has the path "". Limits of a
block device are left out, because device numbers differ between hosts.
"""

from __future__ import annotations

import os
import re

from runtime.cgroups.hierarchies import UNIFIED, below
from runtime.cgroups.monitor import put_aside
from runtime.errors import ContainerError
from runtime.linux.files import read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.cgroups.cgroup import Cgroup

_V1_FILES = (
    "cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.cfs_burst_us", "cpu.idle", "cpuset.cpus", "cpuset.mems",
    "cpuset.cpu_exclusive", "cpuset.mem_exclusive", "cpuset.memory_migrate", "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.swappiness", "pids.max", "blkio.weight",
    "net_cls.classid", "notify_on_release", "cgroup.clone_children",
)  # fmt: skip
_V2_FILES = (
    "cgroup.max.depth", "cgroup.max.descendants", "cpu.weight", "cpu.max", "cpu.max.burst", "cpu.idle",
    "cpu.uclamp.min", "cpu.uclamp.max", "cpuset.cpus", "cpuset.mems", "memory.min", "memory.low", "memory.high",
    "memory.max", "memory.swap.high", "memory.swap.max", "memory.oom.group", "memory.zswap.max", "pids.max",
)  # fmt: skip
_OWNED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks")
_HUGE = re.compile(r"hugetlb\.[0-9A-Za-z]+\.(max|limit_in_bytes|rsvd\.max|rsvd\.limit_in_bytes)")
_CONTROLLER = re.compile(r"(name=)?[a-z0-9_.-]{1,64}")
_MOST = 10_000  # cgroups


def save(paths: dict[str, str], inside: dict[int, int]) -> list[dict[str, Any]]:
    """List the cgroups below a container's cgroups (Cgroup.paths); `inside` maps thread ids here to those inside."""
    found: list[dict[str, Any]] = []
    for directory in dict.fromkeys(paths.values()):
        groups = below(directory)
        if len(groups) < 2:
            continue
        controller = next(name for name, path in paths.items() if path == directory)
        found += [_describe(controller, group, directory, inside) for group in groups]
    return found


def _describe(controller: str, group: str, top: str, inside: dict[int, int]) -> dict[str, Any]:
    unified = controller == UNIFIED
    info = os.stat(group)
    described: dict[str, Any] = {
        "controller": controller, "path": os.path.relpath(group, top) if group != top else "",
        "owner": [info.st_uid, info.st_gid, info.st_mode & 0o7777], "files": {}, "owners": {}, "given": [],
        "threads": [],
    }  # fmt: skip
    try:
        lines = read(f"{group}/{'cgroup.procs' if unified else 'tasks'}").split()
        described["threads"] = sorted(inside[int(line)] for line in lines if int(line) in inside)
        described["given"] = read(f"{group}/cgroup.subtree_control").split() if unified else []
    except OSError:
        pass  # a threaded cgroup: `validate` refuses it if it has processes
    if group == top:
        return described
    for name in sorted(os.listdir(group)):
        if name in _OWNED:
            there = os.stat(f"{group}/{name}")
            if (there.st_uid, there.st_gid) != (0, 0):
                described["owners"][name] = [there.st_uid, there.st_gid]
        elif _is_limit(name, unified=unified):
            try:
                described["files"][name] = read(f"{group}/{name}")
            except OSError:
                continue  # a write-only file
    return described


def _is_limit(name: str, *, unified: bool) -> bool:
    return name in (_V2_FILES if unified else _V1_FILES) or _HUGE.fullmatch(name) is not None


def check(groups: list[Any]) -> None:
    """Raise ContainerError unless `save` could have made this list, so that nothing leads out of the cgroup."""
    wanted = {
        "controller": str, "path": str, "owner": list, "files": dict, "owners": dict, "given": list, "threads": list,
    }  # fmt: skip
    if len(groups) > _MOST:
        raise ContainerError(f"cgroups: more than {_MOST}")
    for group in groups:
        if not isinstance(group, dict) or {name: type(item) for name, item in group.items()} != wanted:
            raise ContainerError("cgroups: an entry is malformed")
        where = f"cgroups: {group['path'][:80]!r}"
        parts = group["path"].split("/") if group["path"] else []
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ContainerError(f"{where}: is not a path below a cgroup")
        if group["controller"] and not _CONTROLLER.fullmatch(group["controller"]):
            raise ContainerError(f"{where}: controller: is malformed")
        unified = group["controller"] == UNIFIED
        for name, value in group["files"].items():
            if not _is_limit(name, unified=unified) or not isinstance(value, str) or len(value) > 4096:
                raise ContainerError(f"{where}: {name[:40]!r} is not a limit")
        if not all(isinstance(name, str) and _CONTROLLER.fullmatch(name) for name in group["given"]):
            raise ContainerError(f"{where}: given: is malformed")
        owners = [*group["owners"].values(), group["owner"][:2]]
        if not set(group["owners"]) <= set(_OWNED) or not all(
            isinstance(ids, list) and len(ids) == 2 for ids in owners
        ):
            raise ContainerError(f"{where}: owners: is malformed")
        numbers = [*(number for ids in owners for number in ids), *group["owner"], *group["threads"]]
        if len(group["owner"]) != 3 or not all(type(number) is int and 0 <= number < 1 << 32 for number in numbers):
            raise ContainerError(f"{where}: has a value that is not a number")
        if group["owner"][2] > 0o7777:
            raise ContainerError(f"{where}: owner: the mode is out of range")


def make(groups: list[dict[str, Any]], cgroup: Cgroup) -> None:
    """Make the directories that `save` has listed before the processes exist, because those may have files there open.

    Raises ContainerError, also on a host with the other cgroup version.
    """
    for group in groups:
        path = f"{_top(cgroup, group['controller'])}/{group['path']}"
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise ContainerError(f"a cgroup of the container cannot be made again: {error}") from None


def _top(cgroup: Cgroup, controller: str) -> str:
    try:
        return cgroup.paths[controller]
    except KeyError:
        raise ContainerError(
            f"the container has nested cgroups in the hierarchy {controller or 'of version 2'}, "
            "which this host does not have"
        ) from None


def restore(groups: list[dict[str, Any]], cgroup: Cgroup, outside: dict[int, int]) -> None:
    """Restore limits and owners of the cgroups that `make` has made, and move the container's processes there.

    `outside` maps thread ids inside to those here. Raises ContainerError.
    """
    gone = {thread for group in groups for thread in group["threads"]} - set(outside)
    if gone:
        raise ContainerError(f"cgroups: there is no thread {min(gone)}")
    for controller in dict.fromkeys(group["controller"] for group in groups):
        top = _top(cgroup, controller)
        mine = [group for group in groups if group["controller"] == controller]
        try:
            if controller == UNIFIED:
                _restore_unified(mine, top, cgroup, outside)
            else:
                _restore_v1(mine, top, outside)
        except OSError as error:
            raise ContainerError(f"a cgroup of the container cannot be made again: {error}") from None


def _restore_v1(groups: list[dict[str, Any]], top: str, outside: dict[int, int]) -> None:
    for group in groups:
        if group["path"]:
            directory = f"{top}/{group['path']}"
            _set_limits(directory, group["files"])
            for thread in group["threads"]:
                _write(f"{directory}/tasks", str(outside[thread]))
            _set_owners(directory, group)


def _restore_unified(groups: list[dict[str, Any]], top: str, cgroup: Cgroup, outside: dict[int, int]) -> None:
    """Restore version 2: processes (CRIU too) leave a cgroup before it enables controllers for its children."""
    below_top = [group for group in groups if group["path"]]
    for group in below_top:
        for thread in group["threads"]:
            _write(f"{top}/{group['path']}/cgroup.procs", str(outside[thread]))
    if any(group["given"] for group in groups if not group["path"]):
        _clear_of_others(top, cgroup, set(outside.values()))
    for group in groups:
        directory = f"{top}/{group['path']}".rstrip("/")
        given = set(read(f"{directory}/cgroup.subtree_control").split())
        for name in group["given"]:
            if name not in given:
                _write(f"{directory}/cgroup.subtree_control", f"+{name}")
        for child in below_top:
            if os.path.dirname(child["path"]) == group["path"]:
                _set_limits(f"{top}/{child['path']}", child["files"])
    for group in below_top:
        _set_owners(f"{top}/{group['path']}", group)


def _clear_of_others(top: str, cgroup: Cgroup, own: set[int]) -> None:
    for pid in map(int, read(f"{top}/cgroup.procs").split()):
        if pid not in own:
            put_aside(cgroup, pid)


def _set_limits(directory: str, files: dict[str, str]) -> None:
    """Set the limits that differ, in two attempts: memory with swap may have to precede memory alone, or follow it."""
    left = {name: value for name, value in files.items() if _differs(f"{directory}/{name}", value)}
    for attempt in range(2):
        for name, value in list(left.items()):
            try:
                _write(f"{directory}/{name}", value)
                del left[name]
            except OSError:
                if attempt:
                    raise


def _differs(path: str, value: str) -> bool:
    try:
        return read(path) != value
    except FileNotFoundError:
        return value not in ("", "0", "max")  # this kernel lacks the limit, and none was set


def _set_owners(directory: str, group: dict[str, Any]) -> None:
    uid, gid, mode = group["owner"]
    os.chown(directory, uid, gid)
    os.chmod(directory, mode)
    for name, (file_uid, file_gid) in group["owners"].items():
        os.chown(f"{directory}/{name}", file_uid, file_gid)


def _write(path: str, value: str) -> None:
    try:
        write(path, value)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {value!r}: {error.strerror}") from None
