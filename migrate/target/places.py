"""Places: what moves have put on this host, what uses it, and when it may be written to or removed.

A place is a bundle below /var/lib/pymigrate/bundles, or a tree that came with a container. It has a mark (marks.py),
and a lock that the agent of a move holds until the container runs, or the move is undone. A place is renewed only by
moves of the container that its mark names, and removed only for the move that its mark names; neither while a living
container of any root uses it, or a move that is not decided refers to it.

Files of a failed move stay for the next attempt if they are worth it. They are marked as not whole: only a move of the
same container takes them, and it compares contents. `clean` removes them.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from migrate.disk import free_bytes
from migrate.errors import MigrateError
from migrate.files import marks, mountinfo, receivers
from migrate.files.fingerprint import size
from migrate.files.marks import Mark
from migrate.files.mountinfo import is_below
from migrate.files.trees import Owner
from migrate.journal import journal
from migrate.journal.journal import DamagedJournal, Entry
from migrate.paths import PLACE_LOCKS as LOCKS
from migrate.phases import FINAL, Phase
from runtime.errors import ContainerError
from runtime.light.records import Record
from runtime.linux import processes
from runtime.paths import DEFAULT_ROOT
from runtime.state.record import State
from runtime.state.status import Status
from runtime.state.store import Store

WORTH_KEEPING = 8 << 20  # bytes; less is sent again as quickly as it is looked through


class Locks:
    """The places that one move, or one clean-up, has locked. The locks end with the process."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def hold(self, path: str) -> bool:
        """Lock the place at `path`. Return False if another process has locked it. Raises OSError."""
        if path in self._held:
            return True
        LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = LOCKS / marks.key(path)
        while True:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(file), os.fstat(fd)):
                    self._held[path] = fd
                    return True
            os.close(fd)  # its last holder has removed the file

    def let_go(self, path: str) -> None:
        """Unlock a place. Harmless when it is not locked."""
        fd = self._held.pop(path, -1)
        if fd >= 0:
            (LOCKS / marks.key(path)).unlink(missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_UN)  # a process forked meanwhile may still have the descriptor
            os.close(fd)

    def release(self) -> None:
        for path in list(self._held):
            self.let_go(path)


class _Use(Record):
    """`words` say what uses `paths`; `owner` is the container of an undecided move, None for a living container."""

    words: str
    paths: tuple[str, ...]
    owner: Owner | None = None


class Uses:
    """The paths that living containers and undecided moves use on this host, at one moment."""

    def __init__(self, uses: list[_Use], mounts: list[mountinfo.Mount], foreign: list[tuple[int, str, str]]) -> None:
        self._uses, self._mounts, self._foreign = uses, mounts, foreign

    @classmethod
    def now(cls, but: str = "") -> Self:
        """Look now. What the migration `but` uses does not count, because it is the one that asks."""
        found = list(journal.scan())
        entries = [item for item in found if isinstance(item, Entry)]
        damaged = [item.entry for item in found if isinstance(item, DamagedJournal) and item.entry is not None]
        roots = {DEFAULT_ROOT, *(str(entry.fields.get("root", DEFAULT_ROOT)) for entry in entries)}
        roots |= {mark.root for mark in marks.every() if mark.root}
        uses = [_living(Path(root), state) for root in sorted(roots) for state in _states(Store(root))]
        undecided = [*filter(_is_open, entries), *damaged]  # the damaged line may have been the decision
        uses += [_undecided(entry) for entry in undecided if entry.migration != but]
        mounts = mountinfo.read()
        return cls(uses, mounts, list(_foreign(mounts)))

    def of(self, path: str, owner: Owner | None = None) -> str:
        """Return what uses `path` or something below it, in words; "" if nothing does.

        Undecided moves of the container `owner` are left out: before another one begins, they are settled.
        """
        for use in self._uses:
            if (use.owner is None or use.owner != owner) and any(is_below(used, path) for used in use.paths):
                return use.words
        on = mountinfo.holding(path, self._mounts)
        if on is not None:
            inner = os.path.normpath(f"{on.root.rstrip('/')}/{os.path.relpath(path, on.place)}")
            for pid, device, root in self._foreign:
                if device == on.device and is_below(root, inner):
                    return f"process {pid} has it mounted"
        return ""

    def mounted_below(self, path: str) -> str:
        """Return what is mounted at `path` or below it in this host's own tree, in words; "" if nothing is."""
        found = (mount.place for mount in self._mounts if is_below(mount.place, path))
        return next((f"something is mounted at {place}" for place in found), "")


def _states(store: Store) -> Iterator[State]:
    """Yield the living containers of one root. One whose state cannot be read is found by its mounts instead."""
    with contextlib.suppress(ContainerError):
        for container_id in store.ids():
            with contextlib.suppress(ContainerError):
                state = store.look(container_id)
                if store.status(state) != Status.STOPPED:
                    yield state


def _living(root: Path, state: State) -> _Use:
    paths = {state.bundle, state.rootfs}
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        config = json.loads((root / state.id / "config.json").read_bytes())
        for mount in config.get("mounts", ()):
            values = [mount.get("source", ""), *",".join(mount.get("options", ())).replace("=", ",").split(",")]
            # Several lower layers of an overlay have a colon between them.
            paths.update(value for text in values for value in (text, *text.split(":")))
    real = {os.path.realpath(path) for path in paths if path.startswith("/")}
    return _Use(f"container {state.id} of --root {root} uses it", tuple(real))


def _undecided(entry: Entry) -> _Use:
    fields = entry.fields
    if entry.role == "source":
        paths = list(fields.get("leaving", {}).get("trees", ()))
    else:
        trees = [item["tree"]["place"] for item in fields.get("trees", ())]
        paths = [fields.get("bundle", ""), fields.get("rootfs", ""), *trees]
    words = f"migration {entry.migration} of container {entry.id} is not decided"
    return _Use(words, tuple(str(path) for path in paths if path), owner_of(entry))


def owner_of(entry: Entry) -> Owner:
    """Return the container that a journal is about. Journals of earlier versions may lack its time of creation."""
    return Owner(entry.id, str(entry.fields.get("created", "")), str(entry.fields.get("root", "")))


def _is_open(entry: Entry) -> bool:
    """Return whether a container may still run from what a move refers to here."""
    if entry.role != "target":
        return entry.phase in (Phase.COMMITTED, Phase.IN_DOUBT)  # before that it lives here
    if entry.phase in (Phase.PREFLIGHT, Phase.SEED):  # nothing is decided without the agent
        agent = entry.fields.get("agent", {})
        return processes.is_alive(int(agent.get("pid", 0)), agent.get("start_time"))
    return entry.phase not in FINAL


def _foreign(own: list[mountinfo.Mount]) -> Iterator[tuple[int, str, str]]:
    """Yield (pid, device, directory in that file system) of the mounts in other mount namespaces.

    Mounts that such a namespace has inherited from this host's are left out.
    """
    known = {(mount.place, mount.device, mount.root) for mount in own}
    seen = {_mount_namespace("self")}
    for name in os.listdir("/proc"):
        if not name.isdigit() or (namespace := _mount_namespace(name)) in seen:
            continue
        seen.add(namespace)
        for mount in mountinfo.read(name):
            if (mount.place, mount.device, mount.root) not in known:
                yield int(name), mount.device, mount.root.removesuffix("//deleted")


def _mount_namespace(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def take(path: str, owner: Owner, migration: str, *, whole: bool = False) -> None:
    """Mark what is at `path` as this move's. The move writes there unless it is `whole`.

    Receivers of an earlier move that wrote there have exited when this returns. Raises OSError, DeadlineExceeded.
    """
    mark = marks.of(path)
    if mark is not None and mark.migration not in ("", migration):
        receivers.end(mark.migration)
    marks.put(path, owner, migration, whole=whole)


def abandon(path: str, migration: str, locks: Locks, made: Sequence[str]) -> None:
    """Keep what a failed move has brought to `path` for the next attempt, or remove it.

    Nothing is touched unless the mark there names this migration. `made` are the paths that did not exist before it; it
    is empty for an older copy that the move has begun to renew, and that copy stays. Without a mark, the empty
    directories among `made` are removed.
    """
    mark = marks.of(path)
    if mark is None:
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    elif mark.migration == migration and locks.hold(path):
        if not mark.made and path in made:  # a mark of an earlier version
            mark = mark.replace(made=tuple((name, marks.inode(name)) for name in made))
        if not made or _is_worth_keeping(path) or remove(mark, Uses.now(migration)):
            with contextlib.suppress(OSError):
                marks.write(mark.replace(failed=True))


def ran(path: str, owner: Owner) -> None:
    """Note that the container runs from the whole files of an earlier move that failed. Raises OSError."""
    mark = marks.of(path)
    if mark is not None and mark.failed and mark.is_of(owner):
        marks.write(mark.replace(failed=False))


def _is_worth_keeping(path: str) -> bool:
    """Return whether the next attempt gains by these files, and the disk has as much room again."""
    try:
        count = size(Path(path))
    except MigrateError:
        return False
    return count >= WORTH_KEEPING and free_bytes(Path(path)) > count


def remove(mark: Mark, uses: Uses) -> str:
    """Remove a place that the caller has locked. Return why it stays, in words; "" if it is removed.

    Raises DeadlineExceeded when a receiver that writes there does not exit.
    """
    if not mark.is_made:
        return "moves have not made it"
    if why := uses.of(mark.path) or uses.mounted_below(mark.path):
        return why
    receivers.end(mark.migration)
    below = [other for other in marks.every() if is_below(other.path, mark.path)]
    if any((other.id, other.created) != (mark.id, mark.created) for other in below):
        return "what belongs to another container is in it"
    try:
        marks.write(mark.replace(whole=False))  # in case this is interrupted
        if os.path.isdir(mark.path) and not os.path.islink(mark.path):
            shutil.rmtree(mark.path)
        else:
            Path(mark.path).unlink(missing_ok=True)
    except OSError as error:
        return f"it cannot be removed: {error.strerror}"
    for other in below:
        marks.drop(other.path)
    marks.drop(mark.path)
    for path, number in reversed(mark.made[:-1]):
        with contextlib.suppress(OSError):
            if marks.inode(path) == number:
                os.rmdir(path)
    return ""


def leftovers() -> list[Mark]:
    """Return the places that failed moves have left for their next attempt."""
    return [mark for mark in marks.every() if mark.is_made and (mark.failed or _was_cut_short(mark))]


def _was_cut_short(mark: Mark) -> bool:
    """Return whether the agent that was filling a place was killed, and no move has followed."""
    try:
        entry = journal.load(mark.migration) if mark.migration else None
    except DamagedJournal:
        return False
    early = entry is not None and entry.phase in (Phase.PREFLIGHT, Phase.SEED)
    return entry is not None and early and entry.role == "target" and not _is_open(entry)


def clean(mark: Mark) -> str:
    """Remove one of `leftovers`. Return why it stays, in words; "" if it is removed. Raises DeadlineExceeded."""
    locks = Locks()
    try:
        if not locks.hold(mark.path):
            return "a move is at work there"
        if marks.of(mark.path) != mark or mark not in leftovers():
            return "another move has taken it meanwhile"
        return remove(mark, Uses.now())
    finally:
        locks.release()
