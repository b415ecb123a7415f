"""CRIU is killed, as by the kernel when memory runs out: the container goes on as if nothing had happened."""

import json
import textwrap

import pytest

from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_soon_clean
from tests.system.network.test_bridge import PLACE, interfaces
from tests.system.network.test_move import FREEZE, PREPARED, assert_in_order, watched

pytestmark = pytest.mark.system

HELPERS = """
import os, signal, subprocess
def kill(*who):
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), *who], capture_output=True, text=True).stdout.split()
    for pid in map(int, found):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
"""
KILL, KILL_GUARD, KILL_SELF = "kill('-x', 'criu')", "kill('-f', 'runtime.freeze.guard')", "os.kill(os.getpid(), 9)"
SCRIPT = "criu query-ext-files"
# Where a dump is: all frozen, the network locked; CRIU's code in a process; all done and held, connections in repair
# mode; restored at the target.
POINTS = {
    "frozen": (SCRIPT, "after", ""),
    "infected": (FREEZE, "before", "os.environ.update(CRIU_FAULT='1') and "),  # it kills itself then
    "held": (FREEZE, "after", ""),
    "prepared": (PREPARED, "after", ""),
}


def killing(point: str, *victims: str, body: str = "") -> str:
    """`pymigrate move web host2` with some killed at a point, and `body` done before."""
    where, when, what = POINTS[point]
    return driver(where, **{when: what + "(" + ", ".join(victims) + ")"}, body=HELPERS + body)


def assert_untouched(lab: Lab, host: str = "host1", point: str = "") -> None:
    """Nothing is locked, frozen or traced; the container counts on."""
    pid = lab.state(host)["pid"]
    assert lab.sh(host, f"nsenter -t {pid} -n nft list tables") == "", point
    assert "TracerPid:\t0\n" in lab.sh(host, f"cat /proc/{pid}/status")
    assert json.loads(lab.on(host, "pymigrate", "state", "web").stdout)["status"] == "running"
    assert "dump.json" not in lab.sh(host, "ls /run/opencontainer/containers/web")
    assert_in_order(lab, host)


@pytest.mark.slow
def test_a_move_ends_as_if_it_had_not_begun(lab: Lab) -> None:
    """At one point after the other; then it is moved all the same, with what CRIU has left in its memory."""
    with watched(lab):
        for point in POINTS:
            done = lab.on("host1", lab.python, "-c", killing(point, KILL), check=False)
            event = json.loads(done.stdout.splitlines()[-1])
            assert (done.returncode, event["workload"]) == (10, "SOURCE"), (point, event, done.stderr)
            assert "as before: criu was killed by SIGKILL" in event["message"], (point, event)
            assert_untouched(lab, point=point)
            assert_soon_clean(lab)
        maps = lab.sh("host1", f"cat /proc/{lab.state('host1')['pid']}/maps")
        assert "memfd:CRIUMFD" in maps
        lab.on("host1", "pymigrate", "move", "web", "host2")
        assert_untouched(lab, "host2")


@pytest.mark.parametrize("point", ["frozen", "held"])
def test_its_coordinator_is_killed_as_well(lab: Lab, point: str) -> None:
    with watched(lab):
        # In this order: a coordinator that is killed first has CRIU undo its work.
        done = lab.on("host1", lab.python, "-c", killing(point, KILL, KILL_SELF), check=False)
        assert done.returncode == 137
        assert_in_order(lab, "host1")
        assert_soon_clean(lab)
        assert_untouched(lab)


@pytest.mark.parametrize("verb", ["recover", "resume", "move"])
def test_its_guard_is_killed_as_well(lab: Lab, verb: str) -> None:
    """Nobody is left to mend it but the next verb: until then its network is locked."""
    with watched(lab):
        done = lab.on("host1", lab.python, "-c", killing("frozen", KILL_GUARD, KILL, KILL_SELF), check=False)
        assert done.returncode == 137
        assert "CRIU" in lab.sh("host1", f"nsenter -t {lab.state('host1')['pid']} -n nft list tables")
        done = lab.on("host1", "pymigrate", verb, "web", *(["host2"] if verb == "move" else []))
        if verb == "recover":
            assert done.stdout == f"web: runs at {lab.sh('host1', 'hostname')}"
        assert_untouched(lab, "host2" if verb == "move" else "host1")


# Another verb, with CRIU killed when the dump is all done, or at the very end when it is told so.
OTHER = (
    HELPERS
    + """
import sys
from migrate.cli import main
from runtime.checkpoint import dump
def complete(self, *args, original=dump.Dump.complete, **options):
    original(self, *args, **options)
    {what}
dump.Dump.complete = complete
sys.exit(main({argv}))
"""
)


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["snapshot", "save", "web", f"{PLACE}/images"], id="snapshot"),
        pytest.param(["snapshot", "save", "--stop", "web", f"{PLACE}/images"], id="snapshot-stop"),
        pytest.param(["checkpoint", "--tcp-established", "--image-path", f"{PLACE}/images", "web"], id="checkpoint"),
        pytest.param(
            ["checkpoint", "--tcp-established", "--leave-running", "--image-path", f"{PLACE}/images", "web"],
            id="checkpoint-leave-running",
        ),
    ],
)
def test_other_dumps(lab: Lab, argv: list[str]) -> None:
    with watched(lab):
        for more in ("", f"; {KILL_SELF}"):
            done = lab.on("host1", lab.python, "-c", OTHER.format(what=KILL + more, argv=argv), check=False)
            assert done.returncode == (137 if more else 9), done.stderr
            assert more or "criu was killed by SIGKILL" in done.stderr
            assert_in_order(lab, "host1")
            assert_untouched(lab)
            if argv[0] == "snapshot" and not more:
                assert lab.sh("host1", f"ls -A {PLACE}").split() == ["config.json", "rootfs"]


def test_what_criu_has_named_is_removed(lab: Lab) -> None:
    """A file that the container has open, and which has lost the name it was opened by, but not all."""
    script = "cd /tmp; echo x > a; ln a b; exec 3< a; rm a; i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
    lab.run(script=script)
    before = lab.wait_count("host1", 1)
    look = f"subprocess.run('ls /proc/{lab.state('host1')['pid']}/root/tmp > /run/names', shell=True)"
    done = lab.on("host1", lab.python, "-c", killing("held", f"({look}, {KILL})"), check=False)
    assert done.returncode == 10
    lab.wait_count("host1", before)
    assert "link_remap" in lab.sh("host1", "cat /run/names")
    assert lab.on("host1", "pymigrate", "exec", "web", "ls", "/tmp").stdout == "b\n"


DIED = "/run/criu-died"
# Goes into the zipapp that is sent: the first CRIU that restores there is killed.
CRIU_DIES = """
import os, pathlib, subprocess
from {module} import {owner}
def dying(*args, original={owner}.{name}, **options):
    result = original(*args, **options)
    if not pathlib.Path("{died}").exists():
        pathlib.Path("{died}").touch()
        subprocess.run(["pkill", "-9", "-x", "criu"], check=True)
    return result
{owner}.{name} = dying
"""


def move_with_patched_agent(lab: Lab, module: str, owner: str, name: str) -> tuple[int, str]:
    """Exit status, and where the container is then."""
    patch = CRIU_DIES.format(module=module, owner=owner, name=name, died=DIED)
    move = (
        "import sys\nfrom migrate.cli import main; from migrate.wire import agent_zip\n"
        f"agent_zip._MAIN = agent_zip._MAIN.replace('    from migrate.target.agent',"
        f" {textwrap.indent(patch, '    ')!r} + "
        "'    from migrate.target.agent')\nsys.exit(main(['--json', 'move', 'web', 'host2']))"
    )
    try:
        done = lab.on("host1", lab.python, "-c", move, check=False)
        lab.sh("host2", f"test -e {DIED}")
    finally:
        lab.sh("host2", f"rm -f {DIED}")
    event = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, event["workload"]


def test_at_the_target(lab: Lab) -> None:
    """Nothing stays there, and the container goes on here."""
    mounts = lab.sh("host2", "wc -l < /proc/self/mountinfo")
    with watched(lab):
        assert move_with_patched_agent(lab, "criu_rpc.client", "Criu", "restore") == (10, "SOURCE")
        assert_soon_clean(lab)
        assert interfaces(lab, "host2") == []
        assert lab.sh("host2", "wc -l < /proc/self/mountinfo") == mounts
        assert_untouched(lab)


def test_at_the_target_when_it_is_too_late(lab: Lab) -> None:
    """It holds the restored container, which the source has given up: it is restored once more."""
    lab.run()
    start = lab.wait_count("host1", 1)
    assert move_with_patched_agent(lab, "migrate.target.handlers", "Held", "confirm") == (0, "TARGET")
    lab.wait_count("host2", start)
    numbers = lab.numbers("host2")
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert (lab.ids("host1"), lab.images("host2")) == ([], [])
