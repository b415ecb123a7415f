"""What the version before has left goes on working after an upgrade."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from migrate.wire import protocol
from runtime.spec.default import default_spec
from tests.support.before import Installed
from tests.support.boxes import PATIENCE
from tests.system.conftest import Lab, Local
from tests.system.lifecycle.test_attach import at
from tests.system.move.test_recover import recover, wait_no_agent, wait_on_disk
from tests.system.snapshots.test_snapshot import wait_beyond

BUNDLE = "/var/lib/pymigrate/test/web"

# The old command line moves `web` to host2 and is killed when it has killed the container's processes.
_KILLED_MOVE = """
import os
from migrate import cli, departure
give_up = departure.Departure.give_up
def killed(*args, **options):
    give_up(*args, **options)
    os.kill(os.getpid(), 9)
departure.Departure.give_up = killed
sys.exit(cli.main(["--json", "move", "web", "host2"]))
"""
_WRITE_AGENT = "from migrate.agent_zip import AgentZip\nopen(sys.argv[1], 'wb').write(AgentZip.build().data)\n"
# The present command line moves `web` to host2, where the code of the version before answers. It is sent as the present
# first stage takes it; its own file would run only from a zip file.
_OLD_AGENT = """
import hashlib, io, marshal, sys, zipfile, zlib
from migrate.cli import main
from migrate.wire.agent_zip import AgentZip
start = b"import os, sys\\nsys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))\\n"
start += b"from migrate.agent import main\\nsys.exit(main())\\n"
with zipfile.ZipFile(sys.argv[1]) as archive:
    files = {name: archive.read(name) for name in archive.namelist()}
members = sorted((files | {"__main__.py": start}).items())
data = zlib.compress(marshal.dumps(members, 2))
agent = AgentZip(data, hashlib.sha256(data).hexdigest(), sum(len(content) for _, content in members))
AgentZip.build = classmethod(lambda cls: agent)
sys.exit(main(["move", "web", "host2"]))
"""
_VERSION = "from migrate import protocol\nprint(protocol.VERSION)\n"


@pytest.fixture
def before(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def run_old(lab: Lab, before: Installed, **changes: Any) -> None:
    """Run the container `web` at host1 by the version before, then upgrade host1."""
    lab.run(start=False, **changes)
    lab.on("host1", before.command, "run", "-d", "-b", BUNDLE, "web")
    before.upgrade()


def test_a_container_that_runs_can_be_moved(lab: Lab, before: Installed) -> None:
    run_old(lab, before)
    reached = lab.wait_count("host1", 3)
    assert lab.on("host1", "pymigrate", "exec", "web", "echo", "in").stdout == "in\n"
    lab.on("host1", "pymigrate", "pause", "web")
    lab.on("host1", "pymigrate", "resume", "web")
    lab.on("host1", "pymigrate", "move", "web", "host2")
    reached = lab.wait_count("host2", reached)
    assert lab.ids("host1") == []
    lab.on("host2", "pymigrate", "move", "web", "host1")
    lab.wait_count("host1", reached)
    numbers = lab.numbers("host1")
    assert numbers == list(range(1, numbers[-1] + 1)), "the output of the version before has come along"


def test_a_container_that_runs_can_be_killed(lab: Lab, before: Installed) -> None:
    run_old(lab, before)
    lab.wait_count("host1", 3)
    lab.on("host1", "pymigrate", "kill", "web", "KILL")
    lab.sh("host1", f"tail -s 0.02 --pid={lab.state('host1')['shim_pid']} -f /dev/null", check=False)
    assert json.loads(lab.on("host1", "pymigrate", "state", "web").stdout)["status"] == "stopped"
    assert lab.numbers("host1")[:3] == [1, 2, 3]
    lab.on("host1", "pymigrate", "delete", "web")
    assert lab.leftovers("host1") == ""


def test_a_terminal_goes_along_with_what_was_typed(lab: Lab, before: Installed) -> None:
    """The old monitor loads the module that takes unread input only now, from the files of the present version."""
    process = default_spec()["process"] | {"terminal": True}
    run_old(lab, before, script="echo ready; head -n 1 | sed 's/^/got: /'; exec sh", process=process)
    with at(lab, "host1") as (screen, attached):
        screen.until("ready\r\n")
        screen.write("half a li")
        screen.until("half a li")
        lab.on("host1", "pymigrate", "move", "--allow", "terminal", "web", "host2")
        assert attached.wait(PATIENCE) == 15
    with at(lab, "host2") as (screen, attached):
        screen.until("half a li")
        screen.write("ne\r")
        screen.until("got: half a line\r\n")
        screen.write("exit 7\r")
        assert attached.wait(PATIENCE) == 7


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_an_undecided_move_is_recovered(lab: Lab, before: Installed, place: str) -> None:
    """The old source was killed after it had committed, and the old agent has kept the images."""
    lab.run(start=False)
    lab.on("host1", before.command, "run", "-d", "-b", BUNDLE, "web")
    reached = lab.wait_count("host1", 1)
    done = lab.on("host1", lab.python, "-c", before.program(_KILLED_MOVE), check=False)
    assert done.returncode == 137, done.stderr
    before.upgrade()
    wait_no_agent(lab)
    if place == "disk":
        wait_on_disk(lab)
    assert recover(lab)[:2] == (0, "web: runs at host2\n")
    lab.wait_count("host2", reached)
    assert (lab.phases("host1"), lab.phases("host2")) == (["resumed"], ["resumed"])
    assert (lab.ids("host1"), lab.images("host2")) == ([], [])


def test_a_snapshot_is_restored(pymigrate: Local, bundle: Path, before: Installed, tmp_path: Path) -> None:
    def old(*argv: object) -> None:
        command = [before.command, "--root", str(pymigrate.root), *map(str, argv)]
        subprocess.run(command, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)

    old("run", "-d", "-b", bundle, "c")
    old("snapshot", "save", "--stop", "c", tmp_path / "snap")
    before.upgrade()
    assert "all intact" in pymigrate("snapshot", "show", tmp_path / "snap").stdout
    reached = int(pymigrate("logs", "--tail", "1", "c").stdout or 0)
    pymigrate("delete", "c")
    pymigrate("snapshot", "restore", tmp_path / "snap")
    wait_beyond(pymigrate, "c", reached)


def test_an_older_agent(lab: Lab, before: Installed, tmp_path: Path) -> None:
    """One that speaks another version of the protocol is refused in one sentence; nothing has been touched then."""
    agent = tmp_path / "agent.pyz"
    subprocess.run([sys.executable, "-c", before.program(_WRITE_AGENT), str(agent)], check=True)
    version = subprocess.run(
        [sys.executable, "-c", before.program(_VERSION)], check=True, capture_output=True, text=True
    ).stdout
    lab.run()
    reached = lab.wait_count("host1", 1)
    done = lab.on("host1", lab.python, "-c", _OLD_AGENT, agent, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    if int(version) == protocol.VERSION:
        assert done.returncode == 0, done.stderr
        lab.wait_count("host2", reached)
        return
    assert done.returncode != 0
    assert f"the source speaks protocol {protocol.VERSION}, this agent {int(version)}" in done.stderr, done.stderr
    assert done.stderr.count("pymigrate: error: ") == 1, done.stderr
    lab.wait_count("host1", reached)
    assert lab.leftovers("host2") == ""
