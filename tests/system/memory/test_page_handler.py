"""A lazy restore under a program that checks its memory while it forks, maps, moves and empties it.

Whatever is killed or stopped meanwhile, it never reads a wrong word.
"""

import contextlib
import os
import random
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import TargetError
from migrate.memory.handler import PageHandler, await_end_of_left
from migrate.memory.store import DATA, INDEX
from runtime.errors import Conflict
from runtime.state import lazy
from runtime.state.record import State
from tests.system.memory.lazy_restore import Program, kill, program, wait_for

MIB, THREADS = 48, 3


@pytest.fixture
def dumped(tmp_path: Path) -> Iterator[Program]:
    """The program, dumped; its memory is in the store."""
    with program(tmp_path, "restless", 1, MIB, THREADS) as running:
        assert running.dump() > MIB << 16
        yield running


def require_right(running: Program) -> None:
    """Its memory is in place and right, and it goes on."""
    wait_for(running.is_whole, "memory is still missing", 60)
    before = len(running.lines("steps"))
    wait_for(lambda: len(running.lines("steps")) > before + 1, "the program does not go on")
    _, _, bad, _, last = running.sweep()
    assert (bad, running.lines("child"), running.lines("failed")) == ("0", [], []), last


def disturb(running: Program, draw: random.Random, handler: PageHandler, times: int) -> int:
    """Kill one of the two processes, or stop it for a moment first, so many times; how often that was before the end.

    The container is resumed after three quarters: before that, memory comes only where the program needs it.
    """
    for number in range(times):
        if number == times * 3 // 4:
            handler.resumed()
        wait_for(lambda: len(running.handlers) == 2 or running.is_whole(), "a killed process was not replaced")
        pids = running.handlers
        if len(pids) < 2:
            return number
        os.sched_yield()
        chosen = draw.choice(pids)
        if draw.random() < 0.2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chosen, signal.SIGSTOP)
                wait_for_steps(running, 0.02)
                os.kill(chosen, signal.SIGCONT)
        wait_for_steps(running, draw.random() * 0.01)
        kill(chosen)
    return times


def wait_for_steps(running: Program, timeout: float) -> None:
    """Let the program run until it says something, but not for long."""
    before = len(running.lines("steps"))
    with contextlib.suppress(AssertionError):
        wait_for(lambda: len(running.lines("steps")) > before, "", timeout)


def test_twenty_kills(dumped: Program) -> None:
    handler = dumped.restore()
    assert len(dumped.handlers) == 2
    assert disturb(dumped, random.Random(1), handler, 27) >= 20
    handler.resumed()
    require_right(dumped)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(34))
def test_a_thousand_kills(tmp_path: Path, seed: int) -> None:
    with program(tmp_path, "restless", seed, MIB, THREADS) as running:
        running.dump()
        handler = running.restore()
        assert disturb(running, random.Random(seed), handler, 40) >= 30
        handler.resumed()
        require_right(running)


def test_the_program_waits_for_stopped_processes(dumped: Program) -> None:
    handler = dumped.restore()
    pids = dumped.handlers
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(dumped.pid, signal.SIGUSR1)  # check everything, of which most is missing
    with pytest.raises(AssertionError, match="swept"):
        wait_for(lambda: dumped.lines("swept"), "swept", 0.5)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: dumped.lines("swept"), "the program does not go on")
    handler.resumed()
    require_right(dumped)


def test_the_store_is_freed_while_it_is_used(dumped: Program) -> None:
    data = dumped.images / DATA
    before = data.stat().st_blocks
    handler = dumped.restore()
    wait_for(lambda: dumped.lines("steps"), "the program does not run")
    assert data.stat().st_blocks == before  # another restore may need it
    handler.resumed()
    require_right(dumped)
    assert data.stat().st_blocks < before / 100


def test_its_starter_may_end_before_the_container_is_resumed(dumped: Program) -> None:
    data = dumped.images / DATA
    before = data.stat().st_blocks
    dumped.restore().leave()
    require_right(dumped)
    assert data.stat().st_blocks == before


def test_both_are_killed(dumped: Program) -> None:
    """Then memory is lost, and that is reported."""
    dumped.restore()
    os.killpg(os.getpgid(dumped.handlers[0]), signal.SIGKILL)
    wait_for(lambda: (found := lazy.read(str(dumped.note))) is not None and found.is_damaged, "it is not reported")
    found = lazy.read(str(dumped.note))
    assert found is not None
    assert "damaged" in str(found)
    assert found.total > MIB << 16


def test_the_program_ends(dumped: Program) -> None:
    dumped.restore()
    os.kill(dumped.pid, signal.SIGKILL)
    assert dumped.handler is not None
    dumped.handler.resumed()
    wait_for(dumped.is_whole, "the page handler does not end")
    assert dumped.handlers == []


def test_a_second_restore_from_the_same_store(dumped: Program) -> None:
    """The first was held, and aborted: by its starter, or by a later process."""
    handler = dumped.restore()
    kill(dumped.pid)
    handler.await_end()
    assert not dumped.note.exists()
    handler = dumped.restore()
    kill(dumped.pid)
    handler.leave()
    await_end_of_left(dumped.note)
    assert (dumped.handlers, dumped.note.exists()) == ([], False)
    dumped.restore().resumed()
    require_right(dumped)


def test_a_store_that_lacks_a_page(dumped: Program) -> None:
    index = bytearray((dumped.images / INDEX).read_bytes())
    space, reserved, address, present, zero = struct.unpack_from("=IIQQQ", index, 32)
    lost = present & -present
    struct.pack_into("=IIQQQ", index, 32, space, reserved, address, present & ~lost, zero)
    (dumped.images / INDEX).write_bytes(index)
    with pytest.raises(TargetError, match="the store lacks"):
        dumped.restore()


def test_what_a_verb_says_meanwhile(dumped: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(id="c", bundle="", rootfs="", created="", log_path=str(dumped.note.parent / "log"), pid=dumped.pid)
    assert lazy.left(state) is None
    lazy.require_whole(state, "move")
    handler = dumped.restore()
    found = lazy.left(state)
    assert found is not None
    assert 0 < found.left <= found.total
    assert str(found).endswith("MiB left")
    assert lazy.shown(state) == {"memory": {"left": found.left, "total": found.total, "damaged": False}}
    monkeypatch.setattr(lazy, "MEMORY_PATIENCE", 0.1)
    with pytest.raises(Conflict, match="are not in place yet"):
        lazy.require_whole(state, "move")
    handler.resumed()
    monkeypatch.setattr(lazy, "MEMORY_PATIENCE", 30.0)
    lazy.require_whole(state, "move")
    assert lazy.shown(state) == {}
    require_right(dumped)
