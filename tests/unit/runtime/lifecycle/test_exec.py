"""The standard streams of a program that becomes a child of the container's init (runtime/lifecycle/exec.py)."""

import os
from threading import Event, Thread

import pytest

from runtime.lifecycle import exec as execution
from runtime.linux import processes
from runtime.state.record import State

pytestmark = pytest.mark.unit


def test_the_log_is_found_while_others_come_and_go() -> None:
    """The monitor's descriptors change with whoever is attached: what is gone when it is looked at is not the log."""
    lowest = os.dup(0)
    reader, writer = os.pipe()
    os.close(lowest)  # of these there are numbers before the log's
    pid = os.getpid()
    name = os.readlink(f"/proc/self/fd/{reader}")
    state = State("c", "/b", "/b/r", "now", "/log", monitor_pid=pid, monitor_start_time=processes.start_time(pid))
    state = state.replace(stdio=("", name, "pipe:[0]"))
    done = Event()

    def come_and_go() -> None:
        while not done.is_set():
            os.close(os.dup(0))

    others = [Thread(target=come_and_go) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(500):
            fd = execution._log_stream(state, 1)
            assert fd >= 0
            os.close(fd)
        assert execution._log_stream(state, 2) == -1
    finally:
        done.set()
        for other in others:
            other.join()
        os.close(reader)
        os.close(writer)
