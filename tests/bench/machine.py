"""The machine of a benchmark: what its figures depend on, and whether it has enough memory."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

from criu_rpc import swrk

_TOP = Path(__file__).resolve().parents[2]
# Memory that a move takes, as multiples of the container: at both ends, and its images at both ends.
_COPIES = 4.5


def machine() -> dict[str, str]:
    """Return what the figures depend on."""

    def first(*argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.partition("\n")[0].strip()

    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    commit = first("git", "-C", str(_TOP), "describe", "--always", "--dirty")
    return {
        "processor": f"{os.cpu_count()} x {(models or [platform.machine()])[0]}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "criu": first(swrk.find(), "--version").split()[-1],
        "runc": first("runc", "--version").split()[-1],
        "commit": commit,
        "date": f"{datetime.date.today()}",
    }


def check_memory(largest: int) -> None:
    """Raise SystemExit if the machine has too little memory for a container of `largest` MiB."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) >> 10
    if largest * _COPIES > available:
        needed = f"{largest} MiB need {largest * _COPIES:.0f} MiB of memory"
        raise SystemExit(f"bench: {needed}, {available} MiB are available: use --memory")
