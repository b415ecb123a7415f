"""A machine loses its power in the middle of things: there is exactly one container afterwards."""

import json
import subprocess

from tests.support.hosts import driver
from tests.vm.machines import Machines

_HOLD = """
def hold():
    print("held", flush=True)
    sys.stdin.readline()
"""


def held_move(machines: Machines, where: str) -> "subprocess.Popen[str]":
    """A move that waits for a line at the end of a point."""
    program = driver(where, after="hold()", body=_HOLD)
    running = machines.start("host1", machines.python, "-c", program, stdin=subprocess.PIPE)
    assert running.stdout is not None
    for line in running.stdout:
        if line == "held\n":
            return running
    raise AssertionError(running.communicate())


def test_source_loses_power_after_the_move(machines: Machines) -> None:
    machines.run()
    before = machines.wait_count("host1", 1)
    machines.on("host1", "pymigrate", "move", "web", "host2")
    machines["host1"].power_off()
    after = machines.wait_count("host2", before)
    machines.up()
    assert machines.phases("host1") == ["resumed"]
    machines.wait_count("host2", after)


def test_source_loses_power_when_it_has_given_the_container_up(machines: Machines) -> None:
    """Killed here by decision, not yet resumed there: the decision is on the disk, and `recover` carries it out."""
    machines.run()
    before = machines.wait_count("host1", 1)
    move = held_move(machines, "end-source")
    machines["host1"].power_off()
    move.communicate()
    machines.up()
    assert machines.phases("host1") == ["committed"]
    machines.on("host1", "pymigrate", "recover", "web")
    assert machines.phases("host1") == ["resumed"]
    machines.wait_count("host2", before)
    numbers = machines.numbers("host2")
    assert numbers == sorted(set(numbers)), "something ran twice"
    assert machines.images("host2") == []


def test_target_loses_power_before_the_point_of_no_return(machines: Machines) -> None:
    """The source waits for a restore that never ends: it goes on as if nothing had happened."""
    machines.run()
    before = machines.wait_count("host1", 1)
    move = held_move(machines, "send-images")
    machines["host2"].power_off()
    out, errors = move.communicate("go on\n", timeout=300)
    assert "Traceback" not in errors
    event = json.loads(out.splitlines()[-1])
    assert (move.returncode, event["workload"]) == (10, "SOURCE"), event
    after = machines.wait_count("host1", before)
    numbers = machines.numbers("host1")
    assert numbers == list(range(1, numbers[-1] + 1))
    # The images have gone with its memory, and what it has on its disk does not stand in the way of the next try.
    machines.up()
    assert machines.images("host2") == []
    machines.on("host1", "pymigrate", "move", "web", "host2")
    machines.wait_count("host2", after)
    assert machines.images("host2") == []
