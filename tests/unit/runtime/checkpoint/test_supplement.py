"""What comes with images beside CRIU's own: nothing in it is used unchecked."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.cgroups import subtree
from runtime.cgroups.cgroup import Cgroup
from runtime.checkpoint import supplement
from runtime.errors import ContainerError
from runtime.spec.resources import merge

GROUP: dict[str, Any] = {
    "controller": "pids", "path": "jobs/1", "owner": [0, 0, 0o755], "files": {"pids.max": "10"},
    "owners": {"cgroup.procs": [5, 6]}, "given": [], "threads": [7],
}  # fmt: skip
TIMER = {"process": 1, "fd": 3, "ticks": 1, "value": 5, "interval": 7, "absolute": 0}
WINDOW = {"process": 1, "fd": 3, "window": [1, 2, 4294967295]}
THREAD = {"processors": [0], "io": [2, 6], "slack": 1, "slice": 2, "core": 3}


def load(directory: Path, data: bytes) -> dict[str, Any]:
    (directory / supplement.NAME).write_bytes(data)
    fd = os.open(directory, os.O_RDONLY)
    try:
        return supplement.load(fd)
    finally:
        os.close(fd)


def test_what_was_saved_is_taken(tmp_path: Path) -> None:
    value = {
        "threads": {"1": THREAD},
        "timers": [TIMER],
        "windows": [WINDOW],
        "cgroups": [GROUP],
        "resources": {"pids": {"limit": 5}},
    }
    assert load(tmp_path, json.dumps(value).encode()) == value


def test_images_without_one(tmp_path: Path) -> None:
    assert supplement.resources(tmp_path) == {}


@pytest.mark.parametrize(
    "value",
    [
        [], {"more": {}}, {"threads": []}, {"threads": {"x": {}}}, {"threads": {"9" * 5000: {}}},
        {"threads": {"\u0663": {}}}, {"threads": {"1": {"more": 1}}},
        {"threads": {"1": {"slack": "1"}}}, {"threads": {"1": {"processors": [-1]}}}, {"threads": {"1": {"io": 3}}},
        {"threads": {"1": {"io": [3]}}},
        {"windows": [{}]}, {"windows": [WINDOW | {"window": [1]}]}, {"windows": [WINDOW | {"window": 1}]},
        {"windows": [WINDOW | {"window": [1, 2, 1 << 32]}]}, {"windows": [WINDOW | {"fd": True}]}, {"windows": {}},
        {"timers": [{}]}, {"timers": [TIMER | {"fd": -1}]}, {"timers": [TIMER | {"value": 1.5}]}, {"resources": []},
        *({"cgroups": [GROUP | change]} for change in (
            {"path": "../x"}, {"path": "/x"}, {"path": "x//y"}, {"path": "x\0"}, {"path": 1}, {"more": 1},
            {"controller": "../x"}, {"files": {"cgroup.procs": "1"}}, {"files": {"../pids.max": "1"}},
            {"files": {"pids.max": 1}}, {"owners": {"pids.max": [0, 0]}}, {"owners": {"cgroup.procs": [0]}},
            {"owner": [0, 0]}, {"owner": [0, 0, True]}, {"owner": [0, 0, 1 << 31]},
            {"threads": ["1"]}, {"given": ["+pids x"]}, {"given": [1]},
        )),
        {"cgroups": [1]},
    ],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ContainerError):
        load(tmp_path, json.dumps(value).encode())


def test_a_cgroup_of_a_thread_that_is_not_the_containers(tmp_path: Path) -> None:
    cgroup = Cgroup({"pids": str(tmp_path)})
    with pytest.raises(ContainerError, match="there is no thread 7"):
        subtree.restore([GROUP | {"path": "x", "threads": [7]}], cgroup, {1: os.getpid()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100000])
def test_what_is_no_json_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ContainerError):
        load(tmp_path, data)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / supplement.NAME).symlink_to("/etc/hostname")
    with pytest.raises(ContainerError):
        supplement.resources(tmp_path)


def test_updates_one_after_the_other() -> None:
    old = {"memory": {"limit": 1, "swap": 2}, "pids": {"limit": 3}}
    assert merge(old, {"memory": {"limit": 9}, "cpu": {"shares": 4}}) == {
        "memory": {"limit": 9, "swap": 2}, "pids": {"limit": 3}, "cpu": {"shares": 4},
    }  # fmt: skip
    assert old == {"memory": {"limit": 1, "swap": 2}, "pids": {"limit": 3}}
