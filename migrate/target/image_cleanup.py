"""Images that moves have left at this host: which ones may be removed, and what becomes of the others.

The images of a move that was never prepared are of no use to anybody: its source has the container. Those of a move
that was prepared, and whose outcome is not known here, may be the last copy of it: they stay, however old they are.
"""

import contextlib

from criu_rpc.errors import Error
from migrate.errors import MigrateError
from migrate.files import receivers
from migrate.journal import journal
from migrate.journal.journal import DamagedJournal, Entry
from migrate.phases import FINAL, Phase
from migrate.target import image_manifest, image_places
from migrate.target import tmpfs as target_tmpfs
from migrate.target.image_keeper import Keeper
from migrate.target.image_places import Found
from migrate.target.images import ReceivedImages
from runtime.light.records import Record
from runtime.linux import processes

_BEFORE = (Phase.PREFLIGHT, Phase.SEED, Phase.PRE_COPY, Phase.STOP_AND_COPY)


class Left(Record):
    """Images with what is known of their move. `entry` is None without a journal that says so."""

    found: Found
    entry: Entry | None
    may_be_last: bool
    in_use: bool


class LastCopy(MigrateError):
    """Images stay that may be the last copy of a container."""

    kind = "conflict"

    def __init__(self, kept: list[Left]) -> None:
        names = [f"{item.entry.id if item.entry else 'an unknown container'} ({item.found.path})" for item in kept]
        asked = [f"at {item.entry.source}: pymigrate recover {item.entry.id}" for item in kept if item.entry]
        super().__init__(
            f"these images may be the last copy of a container, and stay: {', '.join(names)}",
            remedy="\n".join([*dict.fromkeys(asked), "--force removes them all the same"]),
        )


def left(container_id: str | None = None) -> list[Left]:
    """All images at this host, oldest first, or those that are known to be of one container."""
    found = image_places.found()
    used = {item.migration for item in found if item.in_use}  # a copy that is being made is not locked itself
    every = [_look(item, item.migration in used) for item in found]
    return [item for item in every if container_id in (None, item.entry and item.entry.id)]


def _look(found: Found, in_use: bool) -> Left:
    entry, damaged = None, False
    try:
        entry = journal.load(found.migration)
    except DamagedJournal as error:
        entry, damaged = error.entry, True
    if entry is None or entry.role != "target":
        # Without a journal nothing tells that all images had come, but for their manifest.
        return Left(found, None, may_be_last=True, in_use=in_use)
    decided = not damaged and (entry.phase in FINAL or (entry.phase in _BEFORE and not _complete(found)))
    return Left(found, entry, may_be_last=not decided, in_use=in_use or _has_agent(entry))


def _complete(found: Found) -> bool:
    """True if all images had come. The journal cannot say that, because its last line may be lost."""
    return (found.path / image_manifest.NAME).exists()


def _has_agent(entry: Entry) -> bool:
    """True if the agent of this move lives. Agents of earlier versions lock nothing."""
    agent = entry.fields.get("agent")
    if entry.phase in FINAL or not isinstance(agent, dict):
        return False
    return processes.is_alive(int(agent.get("pid", 0)), agent.get("start_time"))


def remove(item: Left) -> None:
    """Remove these images, and what had come of the tmpfs mounts of their move. Raises DeadlineExceeded."""
    migration = item.found.migration
    receivers.end(migration)
    ReceivedImages.remove_left(migration)
    target_tmpfs.remove(migration)


def sweep() -> None:
    """Clean up after agents that were killed, so that every image left in memory has a keeper.

    Images that no move needs are removed. Images that may be the last copy, and whose keeper was killed as well, are
    taken to the disk by a new keeper. No failure here stops a move.
    """
    for item in left():
        if item.in_use or item.found.kind != "memory":
            continue
        with contextlib.suppress(Error, OSError):
            if not item.may_be_last:
                remove(item)
            else:
                Keeper.adopt(item.found.migration, item.found.path)
