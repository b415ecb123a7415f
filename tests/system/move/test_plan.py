"""`move --plan`: it measures and predicts, and leaves no trace at either end."""

import json
from typing import Any

from tests.support.pybox import write_python_bundle
from tests.system.conftest import Lab

# Writes 4096 pages of 64 MiB, again and again, 1024 of them in a second at most.
WRITER = """
import mmap, time
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, 64 << 20, 4096):
    memory[page] = 1
print("ready")
number = 0
while True:
    for _ in range(16):
        memory[number % 4096 * 4096] = number % 251
        number += 1
    time.sleep(0.016)
"""
TRACE = """
find /var/lib/pymigrate /run/pymigrate /run/opencontainer -mindepth 1 -not -name '*.lock' 2> /dev/null | sort
find /sys/fs/cgroup -name '*web*' | sort
cat /run/opencontainer/containers/web/state.json 2> /dev/null
true
"""


def planned(lab: Lab, *options: str) -> dict[str, Any]:
    done = lab.on("host1", "pymigrate", "--json", "move", "--plan", *options, "web", "host2")
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert value["event"] == "plan"
    return value


def write_pages(lab: Lab, tmp_path: Any) -> None:
    write_python_bundle(tmp_path / "web", WRITER)
    for host in ("host1", "host2"):
        lab.put(host, tmp_path / "web", "/var/lib/pymigrate/test/web")
    lab.on("host1", "pymigrate", "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")
    lab.on("host1", "timeout", "30", "sh", "-c", "until pymigrate logs web | grep -q ready; do sleep 0.1; done")


def test_it_measures_and_changes_nothing(lab: Lab, tmp_path: Any) -> None:
    write_pages(lab, tmp_path)
    lab.on("host1", "pymigrate", "validate", "web", "host2")  # both ends keep the agent for the next connection
    before = [lab.sh(host, TRACE) for host in ("host1", "host2")]
    assert "web" in before[0]
    plan = planned(lab)
    assert [lab.sh(host, TRACE) for host in ("host1", "host2")] == before
    assert (plan["target"], plan["mode"], plan["processes"]) == ("host2", "pre-copy", 1)
    assert 64 << 20 < plan["memory"] < 100 << 20
    # Up to 4 MiB a second, each page counted once; less when the machine is busy.
    (_, early), *_, (_, late) = plan["written"]
    assert 0 < early < late < 12 << 20
    assert plan["bandwidth"] > 1 << 20
    assert 0 < plan["round_trip_s"] < 5
    assert plan["gap_low_s"] <= plan["gap_s"] <= plan["gap_high_s"] < plan["total_s"] + plan["gap_high_s"]
    assert plan["rounds"] >= 2
    assert plan["converges"]
    assert plan["bytes"] >= 64 << 20
    assert abs(sum(plan["parts"].values()) - plan["gap_s"]) < 1e-3
    assert plan["dominant"] in plan["parts"]
    assert plan["advice"]
    # The move that follows learns nothing from it, and the plan after that learns from the move.
    assert plan["earlier_moves"] == 0
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.on("host2", "pymigrate", "move", "web", "host1")
    assert planned(lab)["earlier_moves"] == 1


def test_without_rounds_all_memory_is_sent_in_the_freeze(lab: Lab, tmp_path: Any) -> None:
    write_pages(lab, tmp_path)
    text = lab.on("host1", "pymigrate", "move", "--plan", "--mode", "stop-and-copy", "web", "host2").stdout
    assert "mode stop-and-copy, as asked for: no rounds" in text
    assert "memory in the freeze" in text
    assert text.rstrip().endswith("nothing was moved or changed")


def test_a_paused_container_has_nothing_to_measure(lab: Lab) -> None:
    lab.run()
    lab.on("host1", "pymigrate", "pause", "web")
    done = lab.on("host1", "pymigrate", "move", "--plan", "web", "host2", check=False)
    assert done.returncode == 3
    assert "status: container web: is paused" in done.stderr
    assert lab.phases("host1") == []
    lab.on("host1", "pymigrate", "resume", "web")
    done = lab.on("host1", "pymigrate", "move", "--plan", "--report", "/tmp/x.html", "web", "host2", check=False)
    assert (done.returncode, done.stdout) == (2, "")
