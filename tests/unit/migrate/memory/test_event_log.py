"""The log of events: whatever was read is known to the next process, and a full log is replaced."""

import array
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.memory import event_log, uffd
from migrate.memory.event_log import EventLog, Kind
from migrate.memory.layout import PAGE
from migrate.memory.tables import Pieces, Table, Tables

SPACE, FINISHED = 7, 0x52535446
NUMBERS = st.integers(0, 40).map(lambda page: page * PAGE)
MESSAGES = st.one_of(
    st.tuples(st.sampled_from([uffd.REMOVE, uffd.UNMAP]), NUMBERS, NUMBERS),
    st.tuples(st.just(uffd.REMAP), NUMBERS, NUMBERS, NUMBERS),
    st.tuples(st.just(uffd.FORK), st.integers(1000, 1010)),
    st.tuples(st.just(uffd.PAGEFAULT), st.just(0), NUMBERS),
)


@pytest.fixture
def events() -> Iterator[tuple[int, int]]:
    """A pipe in the place of a userfaultfd."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def tables(fd: int) -> Tables:
    missing = Pieces((page * PAGE, (page + 1) * PAGE, page * PAGE) for page in range(0, 40, 3))
    new = Tables({})
    new.open[fd] = Table(SPACE, missing, Pieces([(0, 40 * PAGE, 0)]))
    return new


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(MESSAGES, st.sampled_from(["lives", "dies", "dies before it counts"])), max_size=30))
def test_nothing_is_lost_with_its_reader(events: tuple[int, int], steps: list[tuple[tuple[int, ...], str]]) -> None:
    reader, writer = events
    now = tables(reader)
    log = EventLog.create(now)
    try:
        for (event, *numbers), fate in steps:
            os.write(writer, uffd.message(event, *numbers))
            found = log.read_event(reader, now)
            assert found is not None
            assert found[0] == event
            expected = now.dump()
            if fate != "lives":
                if fate == "dies before it counts" and event != uffd.PAGEFAULT:
                    log._words[0] -= 1
                log.unmap()
                log = EventLog(log.fd)
                now = log.replay()
            assert now.dump() == expected
        assert log.read_event(reader, now) is None
    finally:
        log.close()


def test_a_full_log_goes_on_in_a_new_one(events: tuple[int, int]) -> None:
    reader, writer = events
    now = tables(reader)
    log = EventLog.create(now)
    for number in range(event_log.SLOTS):
        assert not log.is_full
        os.write(writer, uffd.message(uffd.REMAP, number % 40 * PAGE, (100 + number) * PAGE, PAGE))
        log.read_event(reader, now)
    assert log.is_full
    new = EventLog.create(now)
    assert new.replay().dump() == log.replay().dump() == now.dump()
    log.close()
    new.close()


@pytest.mark.parametrize("dies", [False, True])
def test_what_criu_sends(events: tuple[int, int], dies: bool) -> None:
    ours, theirs = socket.socketpair()
    now = Tables({SPACE: tables(0).open[0], 9: tables(0).open[0]})
    log = EventLog.create(now)

    def reopened() -> None:
        nonlocal log, now
        if dies:
            expected = now.dump()
            log._words[0] -= 1
            log.unmap()
            log = EventLog(log.fd)
            now = log.replay()
            assert now.dump() == expected

    with ours, theirs:
        theirs.send(struct.pack("=i", -5))  # a zombie
        assert log.read_pid(ours.fileno(), now)
        reopened()
        assert now.pid == 0
        theirs.send(struct.pack("=i", SPACE))
        assert log.read_pid(ours.fileno(), now)
        reopened()
        assert now.pid == SPACE
        theirs.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [events[0]]))])
        assert log.read_descriptor(ours.fileno(), now)
        reopened()
        (fd,) = now.open
        assert os.path.samestat(os.fstat(fd), os.fstat(events[0]))
        theirs.send(struct.pack("=i", FINISHED))
        assert log.read_pid(ours.fileno(), now)
        reopened()
        assert now.finished
        assert now.initial == {}
        theirs.close()
        assert not log.read_pid(ours.fileno(), now)
    log.note(Kind.CLOSED, fd, now)
    assert now.open == log.replay().open == {}
    log.close()
    os.close(fd)
