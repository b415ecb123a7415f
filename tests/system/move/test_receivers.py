"""Processes that receive the files of a move: when they start, and that none of them is missed when they are ended."""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from migrate.files import receivers

pytestmark = pytest.mark.system
RACES = 600


@pytest.fixture
def migration() -> Iterator[str]:
    name = f"20260101T000000-{secrets.token_hex(8)}"
    yield name
    receivers.end(name)


def start(migration: str, *argv: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*receivers.within(migration), *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )  # fmt: skip


def test_none_starts_but_in_its_time(migration: str) -> None:
    assert start(migration, "true").wait(10) == receivers.REFUSED
    receivers.allow(migration)
    assert start(migration, "true").wait(10) == 0
    receivers.forbid(migration)
    receivers.forbid(migration)
    assert start(migration, "true").wait(10) == receivers.REFUSED
    assert not os.path.exists(receivers.DIRECTORY / migration)


def test_all_are_ended_even_stopped_ones_and_no_others(migration: str) -> None:
    receivers.allow(migration)
    other = f"{migration[:-1]}{'0' if migration[-1] != '0' else '1'}"
    receivers.allow(other)
    script = ("sh", "-c", "sleep 60 & echo; wait")
    ours, foreign = start(migration, *script), start(other, *script)
    for process in (ours, foreign):
        assert process.stdout is not None
        process.stdout.readline()
    ours.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, ours.pid, os.WSTOPPED)
    receivers.end(migration)
    assert ours.wait(10) == -signal.SIGKILL
    assert foreign.poll() is None
    receivers.end(other)
    assert foreign.wait(10) == -signal.SIGKILL


def test_one_that_is_just_starting_is_not_missed(migration: str) -> None:
    """At whatever moment of its start they are ended: it is found, or it does not start."""
    began = time.monotonic()
    receivers.allow(migration)
    start(migration, "true").wait(10)
    usual = time.monotonic() - began
    for number in range(RACES):
        receivers.allow(migration)
        process = start(migration, "sleep", "60")
        time.sleep(usual * number / RACES)
        receivers.end(migration)
        assert process.wait(1) in (-signal.SIGKILL, receivers.REFUSED), number
