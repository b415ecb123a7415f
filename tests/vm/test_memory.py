"""Memory that is sent while the program runs: by soft-dirty bits under Debian 12's kernel, by userfaultfd under 13's.

Without KVM a few MiB go over in a second, so sizes and rates are small.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import writer
from tests.bench.ways import BUNDLE, NAME, Ours
from tests.support import mirror
from tests.support.hosts import driver
from tests.vm.machines import Machines

MEMORY = 24  # MiB
TRACKED_BY = {"12": "soft-dirty bits", "13": "userfaultfd"}[os.environ.get("DEBIAN", "13")]
PATIENCE = 300.0
PLACE = "/root/restless"


class Moved(Ours):
    """A program that checks its memory while it writes; the bundle is at the source only."""

    def __init__(self, machines: Machines, directory: Path, rate: float) -> None:
        super().__init__(machines)
        program = writer.build(directory)
        machines.sh("host1", f"rm -rf {BUNDLE}")
        writer.put_bundle(machines, "host1", BUNDLE, program, [str(MEMORY), f"{rate:g}"])
        self.start()
        self.until("host1", lambda seen: seen.ready, "the program fills its memory", PATIENCE)

    def assert_whole(self, host: str) -> None:
        """Every word of its memory is what it wrote."""
        self.check(host)
        seen = self.until(host, lambda seen: seen.checked, "the program checks its memory", PATIENCE)
        assert seen.bad == 0


@pytest.fixture(autouse=True)
def without_bundle(machines: Machines) -> Iterator[None]:
    yield
    machines.sh("host1", f"rm -rf {BUNDLE}")


def test_what_is_written_meanwhile_is_sent_again(machines: Machines, tmp_path: Path) -> None:
    """Nothing is lost, and the last round is a small part of the memory."""
    program = Moved(machines, tmp_path, 0.1)
    options = ("--timeout", "300", "--max-downtime", "10")
    done = machines.on("host1", "pymigrate", "--json", "move", *options, NAME, "host2")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    print(*rounds, events[-1], sep="\n")
    assert (events[-1]["mode"], events[-1]["mode_reason"]) == ("pre-copy", f"writes are tracked by {TRACKED_BY}")
    assert len(rounds) >= 2
    assert rounds[0]["bytes_read"] >= MEMORY << 20
    assert rounds[-1]["left"] < rounds[0]["bytes_read"] / 2
    program.assert_whole("host2")


@pytest.mark.skipif(TRACKED_BY != "soft-dirty bits", reason="needs soft-dirty bits as the tracker")
def test_criu_leaves_clean_pages_out(machines: Machines, tmp_path: Path) -> None:
    """Its log of a move that fails after the dump tells. The program runs on here, and its memory is whole."""
    program = Moved(machines, tmp_path, 0)
    failing = driver("send-images", before='raise OSError("stopped here")')
    done = machines.on("host1", machines.python, "-c", failing, check=False)
    assert "stopped here" in done.stdout, done
    log = machines.sh("host1", "cat /var/lib/pymigrate/logs/*.log")
    clean = sum(int(pages) for pages in re.findall(r"Pagemap generated: .* (\d+) holes", log))
    assert clean * 4096 > MEMORY << 19
    program.assert_whole("host1")


def test_a_program_that_writes_too_fast_stays(machines: Machines, tmp_path: Path) -> None:
    """With --on-divergence abort it runs on here, and its memory is whole."""
    program = Moved(machines, tmp_path, 20)
    options = ("--mode", "pre-copy", "--on-divergence", "abort")
    done = machines.on("host1", "pymigrate", "move", *options, NAME, "host2", check=False)
    assert done.returncode != 0
    assert "MiB/s of its memory" in done.stderr
    assert "Traceback" not in done.stderr
    program.assert_whole("host1")
    assert machines.ids("host2") == []


def test_soft_dirty_bits_miss_nothing(machines: Machines, tmp_path: Path) -> None:
    """Of a program that maps, moves, empties and unmaps its memory all the time, with huge pages."""
    source = Path(__file__).parents[1] / "system/memory/restless.c"
    (tmp_path / "mirror.py").write_text(Path(mirror.__file__).read_text())
    program = tmp_path / "restless"
    subprocess.run(["gcc", "-O2", "-static", "-o", program, source, "-lpthread"], check=True, timeout=60)
    machines.put("host1", tmp_path, PLACE)
    try:
        argv = (machines.python, f"{PLACE}/mirror.py", f"{PLACE}/restless", "soft-dirty", 1, 32, 3, 12)
        found = json.loads(machines.on("host1", *argv).stdout)
    finally:
        machines.sh("host1", f"rm -rf {PLACE}")
    print(found["written"])
    assert found["pages"] > 100
    assert found["wrong"] == []
