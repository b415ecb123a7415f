"""Follow the moves out of this host that other processes make: `pymigrate migrations --watch`.

A move shows the last event of each kind (journal/under_way.py). Events that come faster than they are looked at are
left out. How the move has ended is in its journal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migrate.events import SHOWN, Event, Monitor
from migrate.journal import journal
from migrate.journal.journal import Entry
from migrate.journal.under_way import Mover, Watch, movers
from migrate.phases import Phase, workload
from migrate.source.cancel import NotUnderWay
from runtime.state.store import Store

_LOOK = 1.0  # seconds after which to look again without any sign


@dataclass(frozen=True)
class End:
    """The end of a move. `entry` is what its journal says, None if it had not begun one."""

    mover: Mover
    entry: Entry | None

    def plain(self) -> dict[str, Any]:
        """Return the end as an event for --json."""
        phase = self.entry.phase if self.entry is not None else None
        fields = {"event": "end", "id": self.mover.id, "migration": self.mover.migration, "target": self.mover.target}
        return {**fields, "phase": phase, "workload": workload(phase)}

    def words(self) -> str:
        """Return one line: where the container is."""
        container, target = self.mover.id, self.mover.target
        if self.entry is None:
            return f"{container}: was not moved to {target}: the move had not begun"
        if self.entry.phase is Phase.RESUMED:
            return f"{container}: runs at {target}"
        if self.entry.phase is Phase.ABORTED:
            return f"{container}: was not moved to {target}: {self.entry.fields.get('reason')}"
        if workload(self.entry.phase) == "SOURCE":
            return f"{container}: was not moved to {target}: the process that moved it was killed"
        return f"{container}: the move to {target} is {self.entry.phase}: pymigrate recover {container}"


def follow(store: Store, container_id: str | None, monitor: Monitor, on_end: Callable[[End], object]) -> None:
    """Pass the events of moves that are under way to `monitor`, until they have ended: of one container, or of all.

    Without a container this also follows what the same processes move next. Raises NotUnderWay.
    """
    if not movers(store.root, container_id):
        whose = f"of container {container_id} " if container_id else ""
        raise NotUnderWay(f"no move {whose}out of this host is under way", remedy="see `pymigrate migrations`")
    with Watch() as watch:
        followed: dict[str, _Followed] = {}
        while True:
            current = {mover.migration: mover for mover in movers(store.root, container_id)}
            for migration, mover in current.items():
                watch.add(mover)
                followed.setdefault(migration, _Followed(mover)).show(monitor)
            for migration in followed.keys() - current.keys():
                mover = followed.pop(migration).mover
                on_end(End(mover, journal.load(migration)))
                if container_id is not None:
                    return
            if not current and not watch.has_processes:
                return
            watch.wait(_LOOK)


class _Followed:
    def __init__(self, mover: Mover) -> None:
        self.mover = mover
        self._seen: dict[str, Event] = {}

    def show(self, monitor: Monitor) -> None:
        """Pass on what is new."""
        shown = self.mover.progress()
        for kind, cls in SHOWN.items():
            fields = shown.get(kind)
            try:
                event = cls(**fields) if isinstance(fields, dict) else None
            except TypeError:
                continue  # of another version
            if event is not None and event != self._seen.get(kind):
                self._seen[kind] = event
                monitor.emit(event)
