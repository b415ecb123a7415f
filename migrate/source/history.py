"""What earlier moves out of this host have measured, from its journals: a prediction learns from them."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from migrate.errors import MigrateError
from migrate.journal import journal
from migrate.journal.journal import Entry
from migrate.memory.forecast import Load, Past
from migrate.paths import JOURNALS
from migrate.phases import Phase

_LOOK = 100  # journals, the newest


def fields(past: Past) -> dict[str, Any]:
    """Return the fields of the journal's last line."""
    load = past.load
    figures = {
        "gap": past.gap, "expected": past.expected, "fixed": past.fixed, "overhead": past.overhead,
        "memory": load.memory, "processes": load.processes, "round_trip": load.round_trip, "eager": load.eager,
        "shared": load.shared,
    }  # fmt: skip
    return {"figures": {name: round(value, 6) for name, value in figures.items()}}


def past(*, directory: Path = JOURNALS) -> list[Past]:
    """Return what the newest moves out of this host have measured, from new to old."""
    found: list[Past] = []
    with contextlib.suppress(OSError):
        names = sorted((name for name in os.listdir(directory) if name.endswith(".jsonl")), reverse=True)
        for name in names[:_LOOK]:
            with contextlib.suppress(MigrateError):
                entry = journal.load(name.removesuffix(".jsonl"), directory=directory)
                if entry is not None and (one := _past(entry)) is not None:
                    found.append(one)
    return found


def _past(entry: Entry) -> Past | None:
    """Return what a journal has measured, None if it has not."""
    figures = entry.fields.get("figures")
    if (entry.role, entry.phase) != ("source", Phase.RESUMED) or not isinstance(figures, dict):
        return None
    try:
        memory, processes, round_trip, fixed, overhead, expected, gap = (
            float(figures[name])
            for name in ("memory", "processes", "round_trip", "fixed", "overhead", "expected", "gap")
        )
        if not all(map(math.isfinite, (memory, processes, round_trip, fixed, overhead, expected, gap))):
            return None
        shared = int(figures.get("shared", 0))  # earlier versions had none
        load = Load(int(memory), int(processes), round_trip, bool(figures["eager"]), shared)
        return Past(entry.target, load, fixed, overhead, expected, gap)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
