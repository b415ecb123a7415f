"""Which older moves of a container a later one closes, and which tree is the one that a move has frozen."""

from typing import Any

import pytest

from migrate.journal import undecided
from migrate.journal.journal import Entry
from migrate.phases import Phase
from runtime.state.record import State

TREE = {"init": [100, 5000], "boot": "b", "before": None}


def entry(number: int, phase: Phase, role: str = "source", started: str = "", **fields: Any) -> Entry:
    fields = {"created": "c", **(TREE if role == "source" else {}), **fields}
    time = started or f"2026-01-01T00:00:0{number}"
    return Entry(f"m{number}", role, "web", "host1", "host2", phase, time, time, fields)


def state(**changes: Any) -> State:
    whole = {"id": "web", "bundle": "/b", "rootfs": "/r", "created": "c", "log_path": "/l"}
    return State(**{**whole, "pid": 100, "pid_start_time": 5000, "started": True, **changes})


OLD = entry(1, Phase.COMMITTED)
NO_INIT = Entry("m1", "source", "web", "host1", "host2", Phase.COMMITTED, "2026-01-01T00:00:01", "", {"created": "c"})


@pytest.mark.parametrize(
    ("later", "closed"),
    [
        pytest.param(entry(2, Phase.RESUMED, "target"), True, id="came-back"),
        pytest.param(entry(2, Phase.PREPARED, "target"), False, id="is-about-to-come-back"),
        pytest.param(entry(2, Phase.ABORTED, "target"), False, id="did-not-come-back"),
        pytest.param(entry(2, Phase.RESUMED, "target", created="d"), False, id="another-container"),
        pytest.param(entry(0, Phase.RESUMED, "target"), False, id="had-come-before"),
        pytest.param(entry(2, Phase.COMMITTED, init=[200, 6000], before="m3"), True, id="left-again"),
        pytest.param(entry(2, Phase.ABORTED), False, id="another-attempt-by-a-clock-set-back"),
    ],
)
@pytest.mark.parametrize("old", [OLD, NO_INIT], ids=["today", "earlier-version"])
def test_a_later_move_closes_an_older_one(old: Entry, later: Entry, closed: bool) -> None:
    known = old is not NO_INIT or later.role == "target"  # whether it was another tree
    assert undecided._is_closed(old, [old, later], None) is (closed and known)


def test_the_move_that_brought_the_frozen_tree_is_not_a_later_one() -> None:
    """Whatever its time says: the clock may have been set back."""
    before = entry(2, Phase.RESUMED, "target")
    assert not undecided._is_closed(entry(1, Phase.COMMITTED, before="m2"), [before], None)


def test_a_container_that_names_another_move_has_come_back() -> None:
    assert undecided._is_closed(OLD, [], state(move="m7"))
    assert not undecided._is_closed(OLD, [], state())
    assert not undecided._is_closed(OLD, [], state(move="m7", created="d"))
    assert not undecided._is_closed(OLD, [], state(move="m7", started=False))
    assert not undecided._is_closed(entry(1, Phase.COMMITTED, before="m7"), [], state(move="m7"))


def test_only_the_frozen_tree_is_the_frozen_tree() -> None:
    assert undecided.is_tree(OLD, state())
    for other in (state(created="d"), state(pid=101), state(pid_start_time=5001), state(move="m7")):
        assert undecided.is_tree(OLD, other) is False
    assert undecided.is_tree(NO_INIT, state()) is None
    assert undecided.is_tree(NO_INIT, state(created="d")) is False
