"""What the emulated processor offers, and this machine's perhaps does not."""

import json

import pytest

from tests.vm.machines import Machines
from tests.workloads import bundle

KINDS = ["protection-keys", "execute-only"]


def test_protection_keys(machines: Machines) -> None:
    """Memory with a key of the program's keeps a container here; memory that may only be executed goes along."""
    for host in ("host1", "host2"):
        if " ospke" not in machines.sh(host, "cat /proc/cpuinfo"):
            pytest.skip("under KVM the machines have no protection keys, as this machine's processor has none")
    bundle.start(machines, bundle.checkers(*KINDS))
    assert bundle.ready(machines, KINDS) == KINDS
    done = machines.on("host1", "pymigrate", "--json", "validate", "web", check=False)
    (blocker,) = json.loads(done.stdout)["blockers"]
    assert blocker["rule"] == "protection-key"
    machines.move("host1", "host2", "--allow", "protection-key")
    said = bundle.check(machines, "host2", KINDS)
    assert said["execute-only"] == "ok"
    assert said["protection-keys"].startswith("failed: a write")
