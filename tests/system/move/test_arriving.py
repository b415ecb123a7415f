"""What is held at the target before its source has given it up: nobody enters it, stops it or removes it."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_still_here

_REFUSED = (
    "exec web true", "exec -d web true", "exec --ignore-paused web true", "kill web 0", "kill --all web KILL",
    "pause web", "resume web", "delete web", "delete --force web", "start web", "update --pids-limit 9 web",
    "attach web", "checkpoint --image-path /tmp/held web", "snapshot save web /tmp/held.snapshot", "move web host1",
    "validate web host1", "events --stats web", "ps web",
)  # fmt: skip


@pytest.fixture
def held(lab: Lab) -> Iterator["subprocess.Popen[str]"]:
    """A move from host1 to host2 that is prepared; it goes on at a line on its stdin, and fails at the line "fail"."""
    lab.run()
    lab.wait_count("host1", 1)
    after = "print('held', flush=True)\n    if 'fail' in sys.stdin.readline(): raise OSError('test')"
    program = driver("stop-and-copy", after=after)
    with lab.start("host1", lab.python, "-c", program, stdin=subprocess.PIPE) as moving:
        assert moving.stdout is not None
        while (line := moving.stdout.readline()) != "held\n":
            assert line, moving.communicate()
        yield moving
        moving.kill()


def test_until_it_runs_it_can_only_be_looked_at(lab: Lab, held: "subprocess.Popen[str]") -> None:
    for words in _REFUSED:
        done = lab.on("host2", "pymigrate", *words.split(), check=False)
        assert done.returncode == (255 if words.startswith("exec") else 5), (words, done)
        assert "web is being moved here from host1" in done.stderr, (words, done.stderr)
        assert "pymigrate recover web" in done.stderr, (words, done.stderr)
    state = json.loads(lab.on("host2", "pymigrate", "state", "web").stdout)
    assert state["status"] == "creating"
    assert lab.ids("host2") == ["web"]
    assert lab.on("host2", "pymigrate", "logs", "web").stdout == ""
    assert "being moved here" not in lab.on("host2", "pymigrate", "recover", "web", check=False).stderr
    out, err = held.communicate("go\n", timeout=lab.timeout)
    assert json.loads(out.splitlines()[-1])["event"] == "report", (out, err)
    lab.wait_count("host2", lab.count("host2"))
    lab.on("host2", "pymigrate", "exec", "web", "true")
    lab.on("host2", "pymigrate", "delete", "--force", "web")


def test_what_is_dead_of_it_can_be_deleted(lab: Lab, held: "subprocess.Popen[str]") -> None:
    """Agent and monitor were killed, as when the power goes: the state alone is left."""
    state = lab.state("host2")
    agent = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -q 'run/pymigrate/[a]gent' && "
    lab.sh("host2", f"{agent} kill -9 ${{p#/proc/}}; done; kill -9 {state['monitor_pid']}; true")
    lab.sh("host2", f"while [ -d /proc/{state['pid']} ]; do usleep 10000 || sleep 0.01; done")
    refused = lab.on("host2", "pymigrate", "exec", "web", "true", check=False)
    assert (refused.returncode, "container not running" in refused.stderr) == (255, True), refused.stderr
    lab.on("host2", "pymigrate", "delete", "web")
    assert lab.ids("host2") == []
    count = lab.count("host1")
    out, err = held.communicate("fail\n", timeout=lab.timeout)
    event = json.loads(out.splitlines()[-1])
    assert (held.returncode, event.get("workload")) == (10, "SOURCE"), (out, err)
    assert_still_here(lab, count)
