"""A target whose root has not got CAP_SYS_RESOURCE: what it cannot give back is found before the freeze."""

import json
from typing import Any

import pytest

from tests.support.hosts import in_agent
from tests.system.conftest import Lab

# The agent, and what it starts, as on a host whose root lacks a capability.
_LACKING = """
from runtime.linux import syscalls
syscalls.prctl(24, {number})  # PR_CAPBSET_DROP
syscalls.capset(*(held & ~(1 << {number}) for held in syscalls.capget()))
"""
# CAP_SYS_RESOURCE, and low limits.
POOR = in_agent(
    "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n" + _LACKING.format(number=24)
)
CANNOT_BIND = in_agent(_LACKING.format(number=10))  # CAP_NET_BIND_SERVICE
RUN = "import sys; from migrate.cli import main; sys.exit(main(['--json', *sys.argv[1:]]))"


def pymigrate(lab: Lab, *argv: str, agent: str = POOR) -> dict[str, Any]:
    """The last event of a command at host1 whose agent lacks something."""
    done = lab.on("host1", lab.python, "-c", agent + RUN, *argv, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return event


@pytest.mark.slow
def test_limits_that_would_be_lost_without_a_word(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    assert (
        lab.on("host1", "pymigrate", "exec", "web", "sh", "-c", "grep 'open files' /proc/1/limits").stdout.split()[4]
        == "1024"
    )
    event = pymigrate(lab, "move", "web", "host2")
    assert (event["kind"], [blocker["rule"] for blocker in event["blockers"]]) == ("blocked", ["limit"])
    assert (
        event["blockers"][0]["problem"] == "has a hard limit of 1024 (open files), and root of host2 can set only 512"
    )
    assert pymigrate(lab, "move", "web", "host2", "--allow", "limit")["event"] == "report"
    lab.wait_count("host2", before)
    # What CRIU makes of it, and why there is the rule.
    pid = lab.state("host2")["pid"]
    assert lab.sh("host2", f"grep 'open files' /proc/{pid}/limits").split()[3:5] == ["512", "512"]


@pytest.mark.slow
def test_processes_of_other_users(lab: Lab) -> None:
    """The source cannot dump them without the capability, and a target without it would be the end of their way."""
    lab.run(start=False)
    bundle = "/var/lib/pymigrate/test/web"
    lab.sh("host1", f"""sed -i 's/"uid": 0/"uid": 1000/' {bundle}/config.json; pymigrate run -d -b {bundle} web""")
    lab.wait_count("host1", 1)
    for can, rule in (("False", "other-uid"), ("True", "one-way")):
        patched = (
            "from migrate.preflight import container, target\n"
            f"container.can_carry_any_uid = target.can_carry_any_uid = lambda: {can}\n"
        )
        done = lab.on("host1", lab.python, "-c", POOR + patched + RUN, "validate", "web", "host2", check=False)
        found = {blocker["rule"]: blocker for blocker in json.loads(done.stdout)["blockers"]}
        assert found.keys() == {rule, "limit"}
        assert "runs as" in found[rule]["problem"]
        assert "CAP_SYS_RESOURCE" in found[rule]["remedy"]


def test_a_capability_that_root_there_lacks(lab: Lab) -> None:
    """CRIU would fail when the source has given the container up already."""
    lab.run()
    before = lab.wait_count("host1", 1)
    event = pymigrate(lab, "move", "web", "host2", agent=CANNOT_BIND)
    assert (event["kind"], [blocker["rule"] for blocker in event["blockers"]]) == ("blocked", ["capabilities"])
    (blocker,) = event["blockers"]
    assert "has CAP_NET_BIND_SERVICE, which root of host2 lacks" in blocker["problem"]
    assert blocker["remedy"] == "give root of host2 the capability, or remove it from process.capabilities"
    lab.wait_count("host1", before)
