"""What processes hold, as /proc shows it, while they come and go."""

import os
import subprocess
from pathlib import Path

import pytest

from migrate.preflight import processes as process_scan
from runtime.linux import processes


def test_a_child_that_came_meanwhile_was_not_started_by_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is looked for before the processes of the namespace: what is forked in between is not in it."""
    script = "sleep 1000 & sh -c 'sleep 1000 & echo ready; wait' & wait"
    argv = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            assert outer.stdout.readline() == "ready\n"
            init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
            entered = ["nsenter", "--pid", "--target", str(init), "sh", "-c", "sleep 1000 & echo in; wait"]
            with subprocess.Popen(entered, stdout=subprocess.PIPE, text=True) as session:
                try:
                    assert session.stdout is not None
                    assert session.stdout.readline() == "in\n"
                    inside = set(processes.container_pids(init))
                    family = processes.descendants(init)
                    assert (len(family), len(inside)) == (4, 6)
                    monkeypatch.setattr(processes, "descendants", lambda pid: {pid})
                    found = {
                        entry.where.split()[1] for entry in process_scan.scan(init) if entry.rule == "exec-session"
                    }
                    assert found == {str(pid) for pid in inside - family}
                finally:
                    os.kill(init, 9)  # and with it the whole namespace
        finally:
            outer.kill()


@pytest.mark.slow
def test_a_number_that_is_given_to_another_file_meanwhile(tmp_path: Path) -> None:
    """A shell's standard output is a file for as long as one `echo > FILE` takes, and a pipe again then."""
    script = f"echo ready; while :; do echo x > {tmp_path}/x; done"
    argv = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "sh", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            assert outer.stdout.readline() == "ready\n"
            init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
            found = [
                entry for _ in range(4000) for entry in process_scan.scan(init) if entry.where.endswith("descriptor 1")
            ]
            assert not found
        finally:
            outer.kill()
