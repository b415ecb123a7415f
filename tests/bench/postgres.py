"""Moves of a PostgreSQL with large shared buffers under pgbench: `python -m tests.bench.postgres [-n ROUNDS] [SCALE]`.

Each round moves it in both modes, by turns. A line has the mode, what the move reports, and the bytes of memory that it
has sent in the freeze. SCALE is that of pgbench: 15 MiB of data for each. The data is on storage that both hosts share.
"""

import argparse
import json
import os
import tempfile
from typing import Any

from tests.support.services import Postgres
from tests.system.conftest import Lab

_MIB = 1 << 20


class Large(Postgres):
    """512 MiB of shared buffers. The data is in a directory of this machine, which the hosts of a lab share."""

    settings = "-c shared_buffers=512MB"

    def __init__(self, data: str, scale: int) -> None:
        super().__init__()
        self._data, self.scale = data, scale  # type: ignore[misc]

    def configure(self, config: dict[str, Any]) -> None:
        super().configure(config)
        config["root"]["readonly"] = True
        config["mounts"].append({"destination": "/srv", "source": self._data, "type": "bind", "options": ["bind"]})

    def warm(self, lab: Lab, host: str) -> None:
        """Read the tables into the buffers."""
        tables = "'pgbench_accounts', 'pgbench_accounts_pkey', 'pgbench_history'"
        query = f"create extension pg_prewarm; select pg_prewarm(name) from unnest(array[{tables}]) as name"
        self.inside(lab, host, f"{self._programs}/psql", "-h", "/tmp", "-c", query, "postgres")


def line(report: dict[str, Any]) -> str:
    """Return the line of one move."""
    frozen = report["memory_sent"] - sum(done["bytes_sent"] for done in report["rounds"])
    phases = ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in report["phases"].items())
    return (
        f"{report['mode']:<14}downtime {report['downtime_s'] * 1000:.0f} ms, total {report['total_s']:.1f} s, memory "
        f"{report['memory_sent'] / _MIB:.0f} MiB, {frozen / _MIB:.1f} of it in the freeze; ms: {phases}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--rounds", type=int, default=3)
    parser.add_argument("scale", type=int, nargs="?", default=30)
    wanted = parser.parse_args()
    lab = Lab(f"bench-{os.getpid()}")
    lab.lab("up")
    try:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as data:
            os.chmod(data, 0o700)
            os.chown(data, Large.owner, Large.owner)
            service = Large(data, wanted.scale)
            service.start(lab, "host1")
            _move(lab, service, wanted.rounds)
            lab.on("host1", "pymigrate", "delete", "--force", service.name)
    finally:
        lab.lab("down")


def _move(lab: Lab, service: Large, rounds: int) -> None:
    """Move it to and fro, and print a line for each move, and what its client saw."""
    places = ["host1", "host2"]
    with service.client(lab) as client:
        service.warm(lab, places[0])
        for _ in range(rounds):
            for mode in ("stop-and-copy", "pre-copy"):
                options = ("--volume", "/srv=shared", "--compress", "none", "--mode", mode)
                done = lab.on(places[0], "pymigrate", "--json", "move", *options, service.name, places[1])
                print(line(json.loads(done.stdout.splitlines()[-1])), flush=True)
                places.reverse()
        seen = service.check(lab, places[0], client)
    print(f"{seen.done} transactions, none failed; the longest pause was {seen.gap * 1000:.0f} ms")


if __name__ == "__main__":
    main()
