"""What processes hold, as /proc shows it, while they come and go."""

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
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            assert outer.stdout.readline() == "ready\n"
            init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
            entered = ["nsenter", "--pid", "--target", str(init), "sh", "-c", "echo in; sleep 1000 & wait"]
            with subprocess.Popen(entered, stdout=subprocess.PIPE, text=True) as session:
                assert session.stdout is not None
                assert session.stdout.readline() == "in\n"
                inside = set(processes.container_pids(init))
                family = processes.descendants(init)
                assert len(family) == 4
                assert len(inside) == 6
                monkeypatch.setattr(processes, "descendants", lambda pid: {pid})
                found = {finding.where.split()[1] for finding in procscan.scan(init) if finding.rule == "exec-session"}
                assert found == {str(pid) for pid in inside - family}
                for pid in inside - family:
                    os.kill(pid, 9)
        finally:
            outer.kill()
