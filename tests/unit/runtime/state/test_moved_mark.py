"""The mark on the bundle of an engine's container that was moved away."""

import os
from pathlib import Path

import pytest

from runtime.errors import Conflict, NotFound
from runtime.linux import processes
from runtime.state import moved_mark
from runtime.state.record import State


def state(bundle: Path, **changes: object) -> State:
    return State(id="web", bundle=str(bundle), rootfs="/", created="", log_path="").replace(**changes)


def test_an_engine_does_not_start_again_what_was_moved(tmp_path: Path) -> None:
    moved_mark.note(state(tmp_path, monitor_pid=5))  # has a monitor
    moved_mark.require_not_moved("web", str(tmp_path))
    moved_mark.note(state(tmp_path))
    with pytest.raises(Conflict, match="was moved"):
        moved_mark.require_not_moved("web", str(tmp_path))
    moved_mark.erase(str(tmp_path))
    moved_mark.erase(str(tmp_path))
    moved_mark.require_not_moved("web", str(tmp_path))


def test_an_engine_does_not_delete_what_has_come_back(tmp_path: Path) -> None:
    alive = {"pid": os.getpid(), "pid_start_time": processes.start_time(os.getpid()), "monitor_pid": 5}
    here = state(tmp_path / "other", bundle_hints=(str(tmp_path),), **alive)
    moved_mark.require_not_returned(here)
    moved_mark.note(state(tmp_path))
    with pytest.raises(NotFound, match="does not exist"):
        moved_mark.require_not_returned(here)
    moved_mark.require_not_returned(here.replace(pid_start_time=1))  # it has ended
