"""The order of calls: one table, and handlers that fit it."""

import itertools
from typing import Any

import pytest

from migrate.errors import ProtocolError
from migrate.target import handlers
from migrate.wire import order, protocol
from migrate.wire.frames import FrameType
from migrate.wire.order import ORDER, STREAMED, Progress, Stage, method_of
from migrate.wire.protocol import Call
from tests.contract.test_protocol import CALLS, NAMES


def test_the_table_has_every_call() -> None:
    assert ORDER.keys() == set(protocol.CALLS[protocol.VERSION].values())


def test_every_stage_can_be_reached_and_a_stage_that_ends_nothing_has_a_way_on() -> None:
    reached = {Stage.CONNECTED, *(stage for step in ORDER.values() for stage in (step.then, step.failed) if stage)}
    assert reached == set(Stage)
    ends = {Stage.RUNNING, Stage.DECIDED}
    assert set().union(*(step.allowed for step in ORDER.values() if step.then)) == set(Stage) - ends


def test_each_call_has_a_handler_where_it_is_allowed_and_nowhere_else() -> None:
    """But Abort, which each has; where a call has failed it is the handler of the stage before."""
    for (cls, step), (stage, handler) in itertools.product(ORDER.items(), handlers.BY_STAGE.items()):
        if cls is protocol.Abort:
            continue
        shared = any(handler is handlers.BY_STAGE.get(other) for other in step.allowed)
        assert hasattr(handler, method_of(cls)) == (stage in step.allowed or shared), (cls, stage)
    assert set(handlers.BY_STAGE) == set(Stage) - {Stage.FAILED, Stage.DECIDED}
    for kind, stages in STREAMED.items():
        for stage in stages:
            assert hasattr(handlers.BY_STAGE[stage], "memory" if kind is FrameType.MEMORY else "stream")


def at(stage: Stage) -> Progress:
    progress = Progress()
    progress.stage = stage
    return progress


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_what_is_out_of_order_is_a_protocol_error(call: Call[Any], stage: Stage) -> None:
    progress = at(stage)
    if stage in ORDER[type(call)].allowed:
        assert progress.admit(call)
    elif stage is Stage.FAILED and call.reply is None:
        assert not progress.admit(call)
    else:
        with pytest.raises(ProtocolError, match=f"{type(call).__name__} is out of order: the conversation is at"):
            progress.admit(call)
    assert progress.stage is stage


@pytest.mark.parametrize("kind", FrameType, ids=lambda kind: kind.name)
def test_data_comes_only_where_the_table_says(kind: FrameType) -> None:
    for stage in Stage:
        if stage in STREAMED.get(kind, ()):
            assert at(stage).admit_frame(kind)
        elif kind in STREAMED and stage is Stage.FAILED:
            assert not at(stage).admit_frame(kind)
        else:
            with pytest.raises(ProtocolError, match="out of order"):
                at(stage).admit_frame(kind)


def test_a_move_from_its_start_to_its_end() -> None:
    progress = Progress()
    move = """Hello Facts CheckPorts CheckTrees CheckFiles Discard OpenBundle BundleSent TreesSent Prepare PagesBegin
        PagesEnd Image ImageEnd Image ImageEnd Restore Confirm Resume History"""
    for name in move.split():
        assert progress.admit(NAMES[name])
        progress.done(NAMES[name])
    assert progress.stage is Stage.RUNNING


def test_after_a_failure_there_is_only_abort_and_none_once_the_source_has_ended_the_container() -> None:
    for call in CALLS:
        step = ORDER[type(call)]
        for stage in step.allowed:
            progress = at(stage)
            progress.failed(call)
            assert progress.stage is (step.failed or stage)
    after = {cls for cls, step in ORDER.items() if Stage.FAILED in step.allowed}
    assert after == {protocol.Abort}
    assert not [cls for cls, step in ORDER.items() if Stage.DECIDED in step.allowed]
    assert order.ORDER[protocol.Resume].failed is Stage.DECIDED
