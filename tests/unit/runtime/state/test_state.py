"""state.json over versions: what this one has added is what it is by default; all else is refused."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import StateError
from runtime.state.record import State
from runtime.state.store import Store
from tests.support.hosts import PYMIGRATE

# As version 0.1.0 has written it before there were limits of `update` in it.
OLD = {
    "ociVersion": "1.2.0", "id": "c", "bundle": "/b", "rootfs": "/b/rootfs", "created": "2026-11-24T09:00:00.1Z",
    "log_path": "/run/c/log", "pid": 4711, "pid_start_time": 99, "monitor_pid": 4710, "monitor_start_time": 98,
    "started": True, "hooks": {}, "cgroup_paths": {"": "/sys/fs/cgroup/pymigrate/c"}, "systemd_unit": None,
    "namespace_paths": {}, "stdio": ["/dev/null", "pipe:[1]", "pipe:[2]"], "annotations": {"a": "b"},
    "bundle_hints": [], "move": None,
}  # fmt: skip


def load(tmp_path: Path, value: Any) -> State:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/state.json").write_text(json.dumps(value))
    return Store(tmp_path).load("c")


def test_one_of_an_earlier_version(tmp_path: Path) -> None:
    state = load(tmp_path, OLD)
    assert (state.pid, state.cgroup_paths, state.resources) == (4711, OLD["cgroup_paths"], {})
    store = Store(tmp_path)
    store.save(state.replace(started=False))
    assert store.load("c") == state.replace(started=False)


@pytest.mark.parametrize(
    "name", ["id", "bundle", "rootfs", "created", "log_path", "pid", "monitor_pid", "cgroup_paths"]
)
def test_what_every_version_has_must_be_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateError, match="is not a state of this version"):
        load(tmp_path, {key: value for key, value in OLD.items() if key != name})


def test_what_only_a_later_version_knows(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is not a state of this version"):
        load(tmp_path, OLD | {"more": 1})


def test_what_is_half_made_is_not_listed(tmp_path: Path) -> None:
    """Nor is there a warning, as there is of what somebody who was killed has left."""
    store = Store(tmp_path)
    with store.lock("c"):
        store.create("c")
        assert _list(tmp_path) == ("", "")
    shown, said = _list(tmp_path)
    assert (shown, said) == ("", "pymigrate: warning: container does not exist: c\n")


def _list(root: Path) -> tuple[str, str]:
    done = subprocess.run([*PYMIGRATE, "--root", root, "list", "-q"], capture_output=True, text=True)
    return done.stdout, done.stderr


def test_a_state_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It calls the monitor a shim."""
    store, path = Store(tmp_path), tmp_path / "c" / "state.json"
    store.create("c")
    state = State(id="c", bundle="/b", rootfs="/b/rootfs", created="now", log_path="/log", monitor_pid=7)
    store.save(state)
    path.write_text(path.read_text().replace("monitor_", "shim_"))
    assert "shim_pid" in path.read_text()
    assert store.load("c") == state
