"""What processes hold, as /proc shows it, while they come and go."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from migrate import procscan
from runtime import processes


def test_a_child_that_came_meanwhile_was_not_started_by_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is looked for before the processes of the namespace: what is forked in between is not in it."""
    script = "sleep 1000 & sh -c 'sleep 1000 & echo ready; wait' & wait"
    argv = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        stack.callback(outer.kill)
        assert outer.stdout is not None
        assert outer.stdout.readline() == "ready\n"
        init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        entered = ["nsenter", "--pid", "--target", str(init), "sh", "-c", "sleep 1000 & echo in; wait"]
        session = stack.enter_context(subprocess.Popen(entered, stdout=subprocess.PIPE, text=True))
        stack.callback(os.kill, init, 9)  # and all in its namespace with it
        assert session.stdout is not None
        assert session.stdout.readline() == "in\n"
        inside = set(processes.container_pids(init))
        family = processes.descendants(init)
        assert (len(family), len(inside)) == (4, 6)
        monkeypatch.setattr(processes, "descendants", lambda pid: {pid})
        found = {finding.where.split()[1] for finding in procscan.scan(init) if finding.rule == "exec-session"}
        assert found == {str(pid) for pid in inside - family}
