"""What moves cost that carry files in a tmpfs: `python -m tests.bench.tmpfs [MIB...]`; 0, 10, 70 and 300 by default.

Two moves of each, there and back: the second one is shown. The files are random, so that nothing can be compressed. One
in which something is mounted goes with the images, as CRIU packs it.
"""

import json
import os
import sys
from typing import Any

from runtime.spec.default import default_spec
from tests.support.hosts import COUNT
from tests.system.conftest import Lab

KINDS = {"in passes": [], "with the images": [{"destination": "/tmp/below", "type": "tmpfs", "source": "tmpfs"}]}
STEPS = ("dump", "images", "files", "restore")


def measure(lab: Lab, mebibytes: int, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of the move back of a container with that much in its /tmp."""
    fill = f"dd if=/dev/urandom of=/tmp/data bs=1M count={mebibytes} 2>/dev/null; "
    lab.run(script=fill + COUNT, mounts=[*default_spec()["mounts"], *mounts])
    try:
        lab.wait_count("host1", 1)
        lab.on("host1", "pymigrate", "move", "web", "host2")
        done = lab.on("host2", "pymigrate", "--json", "move", "web", "host1")
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return report
    finally:
        for host in ("host1", "host2"):
            lab.sh(host, "pymigrate delete -f web 2>/dev/null; rm -rf /var/lib/pymigrate/*", check=False)


def main(argv: list[str]) -> None:
    lab = Lab(f"bench-{os.getpid()}")
    lab.lab("up")
    try:
        for mebibytes in map(int, argv or ("0", "10", "70", "300")):
            for kind, mounts in KINDS.items():
                report = measure(lab, mebibytes, mounts)
                steps = ", ".join(f"{name} {report['phases'].get(name, 0):.3f}" for name in STEPS)
                print(f"{mebibytes:4} MiB {kind}: downtime {report['downtime_s']:.3f} s ({steps})", flush=True)
    finally:
        lab.lab("down")


if __name__ == "__main__":
    main(sys.argv[1:])
