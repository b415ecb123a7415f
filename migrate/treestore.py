"""The target's half of file trees: where they are put, whose they are, and what is removed when the move fails.

A tree is only ever put where nothing is, or where an earlier move of the same container has put it or left it. A mark
below /var/lib/pymigrate/trees says so: it names the container, the directory by its inode and the time when it was made
(numbers of inodes are used again), and whether the copy is whole. A copy that a failed move has begun to renew stays,
marked as not whole; what a move has newly made is removed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate import mountinfo, receivers
from migrate.atomic import write_atomically
from migrate.errors import MigrateError, TargetError
from migrate.files import fingerprint, size
from migrate.hostfacts import DATA
from migrate.space import existing, free_bytes
from migrate.trees import Needed, Owner, Tree
from runtime import syscalls

MARKS = DATA / "trees"


@dataclass(frozen=True)
class Mark:
    """What is known of a tree at `path`: whose it is, and whether a move was writing to it (`whole` is false then)."""

    path: str
    owner: str
    inode: tuple[int, int, int]
    migration: str
    whole: bool


def _file(path: str) -> Path:
    return MARKS / (hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + ".json")


def _inode(path: str) -> tuple[int, int, int]:
    info = os.lstat(path)
    return info.st_dev, info.st_ino, syscalls.birth_time(path)


def mark_of(path: str) -> Mark | None:
    """The mark of what lies at `path` now; None when there is none, or it speaks of something that is gone."""
    try:
        value = json.loads(_file(path).read_bytes())
        mark = Mark(value["path"], value["owner"], tuple(value["inode"]), value["migration"], value["whole"])
        info = os.lstat(path)
        # A file is replaced while it is renewed; a directory stays.
        same = (stat.S_ISREG(info.st_mode) and not mark.whole) or mark.inode == _inode(path)
        return mark if same and mark.path == path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def set_mark(path: str, owner: Owner, migration: str, *, whole: bool) -> None:
    """Say whose the tree at `path` is. Raises OSError."""
    MARKS.mkdir(mode=0o700, parents=True, exist_ok=True)
    inode = _inode(path) if os.path.lexists(path) else (0, 0, 0)
    value = {"path": path, "owner": owner.mark, "inode": inode, "migration": migration, "whole": whole}
    write_atomically(_file(path), json.dumps(value).encode())


def renew(path: str, owner: Owner, migration: str) -> None:
    """Mark what lies at `path` as being written to, when nobody does so any more for an earlier move that has failed.

    Raises OSError, DeadlineExceeded.
    """
    mark = mark_of(path)
    if mark is not None and not mark.whole and mark.migration != migration:
        receivers.end(mark.migration)
    set_mark(path, owner, migration, whole=False)


def drop_mark(path: str) -> None:
    _file(path).unlink(missing_ok=True)


def leave(leaving: dict[str, list[str]], owner: Owner, migration: str) -> None:
    """The container has gone from this host: what lies here is a copy that its next move back may renew.

    `leaving`: {"trees": places, "links": names that CRIU's dump has given to files without one}.
    """
    for path in leaving.get("links", []):
        with contextlib.suppress(OSError):
            os.unlink(path)
    for path in leaving.get("trees", []):
        with contextlib.suppress(OSError):
            set_mark(path, owner, migration, whole=True)


def is_ours(path: str, owner: Owner) -> bool:
    """Whether a move of this very container has put or left what lies at `path`."""
    mark = mark_of(path)
    return mark is not None and mark.owner == owner.mark


def check(trees: list[Tree], needed: list[Needed], owner: Owner, reserved: int) -> dict[str, Any]:
    """What speaks against these trees here, nothing touched.

    Answers {"problems": [[rule, path, text]], "found": [names of trees that are taken as they lie here]}. `reserved`
    are bytes that /var/lib/pymigrate must take beside.
    """
    problems: list[tuple[str, str, str]] = []
    found: list[str] = []
    wanted: dict[int, tuple[Path, int]] = {}
    for tree in trees:
        if tree.found and os.path.isfile(tree.source):
            found.append(tree.name)
            continue
        state = _state(tree, owner)
        if isinstance(state, str):
            problems.append(("foreign-data", tree.place, state))
        elif tree.size > state:
            place = existing(Path(tree.place))
            device = place.stat().st_dev
            wanted[device] = (place, wanted.get(device, (place, 0))[1] + tree.size - state)
    for item in needed:
        problems += _missing(item)
    for place, count in wanted.values():
        free = free_bytes(place)
        count += reserved if existing(DATA).stat().st_dev == place.stat().st_dev else 0
        if free < count:
            text = f"has {free >> 20} MiB free, {(count >> 20) + 1} MiB are needed for what goes along"
            problems.append(("no-space", str(place), text))
    return {"problems": problems, "found": found}


def _state(tree: Tree, owner: Owner) -> int | str:
    """How many bytes of the tree are here already, or why it cannot be put there."""
    path = tree.place
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        problem = _bad_parent(path)
        return problem or 0
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if _bad_parent(path):
        return _bad_parent(path)
    if stat.S_ISLNK(info.st_mode) or stat.S_ISREG(info.st_mode) != tree.single:
        return "is there, and is something else"
    if tree.fingerprint and _matches(tree):
        return tree.size
    if tree.empty:
        return 0 if is_ours(path, owner) or not os.listdir(path) else "exists, and no move of this container brought it"
    if is_ours(path, owner):
        return size(Path(path))
    return "exists, and no move of this container brought it"


def _matches(tree: Tree) -> bool:
    try:
        return fingerprint(Path(tree.place)) == tree.fingerprint
    except MigrateError:
        return False


def _bad_parent(path: str) -> str:
    """What keeps a directory from being made at `path`: a link or a file on the way. "" when nothing does."""
    current = ""
    for part in os.path.dirname(path).split("/")[1:]:
        current += "/" + part
        try:
            mode = os.lstat(current).st_mode
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"cannot be looked at: {error.strerror}"
        if part and not stat.S_ISDIR(mode):
            return f"{current} on the way to it is no directory"
    return ""


def _missing(needed: Needed) -> list[tuple[str, str, str]]:
    with contextlib.suppress(OSError):
        os.stat(f"{needed.path}/.")  # has an automounter mount it
    try:
        mode = os.stat(needed.path).st_mode
    except OSError:
        return [("missing-source", needed.path, "does not exist")]
    if stat.S_ISDIR(mode) != needed.directory:
        return [("missing-source", needed.path, f"is {'a' if stat.S_ISDIR(mode) else 'no'} directory there")]
    mark = mark_of(needed.path)
    if mark is not None and not mark.whole:
        return [("missing-source", needed.path, "is what a move that failed has left half renewed")]
    problem = _not_shared(needed) if needed.network else ""
    return [("not-shared", needed.path, problem)] if problem else []


def _not_shared(needed: Needed) -> str:
    """Why what is here is not what the source has on its network file system, "" if it is."""
    path = os.path.realpath(needed.path)
    mount = mountinfo.holding(path, mountinfo.read())
    if mount is None or mount.network != needed.network:
        seen = f"is on {mount.network or mount.fstype} {mount.source}" if mount else "is on no mount"
    elif mount.device != mountinfo.device(os.stat(path)):
        seen = f"is hidden by what is mounted over {mount.source}"
    elif needed.export not in ("", mount.export(path)):
        seen = f"is {mount.network} {mount.export(path)}"
    else:
        return ""
    return f"{seen} there, and {f'{needed.network} {needed.export}'.strip()} at the source"


@dataclass(frozen=True)
class Placed:
    """A tree that this move puts here: `made` are the paths that did not exist, outermost first."""

    tree: Tree
    made: tuple[str, ...]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        return {"tree": self.tree.to_json(), "made": list(self.made), "complete": self.complete}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placed":
        return cls(Tree.from_json(value["tree"]), tuple(value["made"]), bool(value["complete"]))


class Arrivals:
    """The trees of one move into this host."""

    def __init__(self, owner: Owner, migration: str, placed: list[Placed]) -> None:
        self._owner, self._migration = owner, migration
        self.placed = placed

    @classmethod
    def plan(cls, trees: list[Tree], owner: Owner, migration: str) -> "Arrivals":
        """Decide where each goes; nothing is touched yet. Raises TargetError when one cannot be put there."""
        placed, coming = [], set()
        for tree in trees:
            state = _state(tree, owner)
            if isinstance(state, str):
                raise TargetError(f"{tree.place}: {state}")
            made, path = [], tree.place
            while not os.path.lexists(path) and path not in coming:
                made.append(path)
                path = os.path.dirname(path)
            coming.update(made)
            complete = not made and bool(tree.fingerprint) and _matches(tree)
            placed.append(Placed(tree, tuple(reversed(made)), complete))
        return cls(owner, migration, placed)

    def make(self) -> None:
        """Make the directories; from here on `undo` is needed. Raises OSError, DeadlineExceeded."""
        for item in self.placed:
            if item.complete:
                continue
            if not item.made:
                renew(item.tree.place, self._owner, self._migration)
                if item.tree.empty:  # a volatile overlay is not mounted over what one has left
                    for name in os.listdir(item.tree.place):
                        remove(os.path.join(item.tree.place, name))
            for path in item.made if not item.tree.single else item.made[:-1]:
                _make_directory(path)
            if item.made:
                set_mark(item.tree.place, self._owner, self._migration, whole=False)

    def verify(self) -> None:
        """Check what rsync has brought, as far as it must not change any more. Raises TargetError."""
        for item in self.placed:
            if item.tree.fingerprint and not item.complete and not _matches(item.tree):
                raise TargetError(
                    f"{item.tree.place} is not what the source has at {item.tree.source}",
                    remedy="did it change while it was sent? what is mounted read-only must not be written to",
                )

    def confirm(self) -> None:
        """The container runs here: the copies are whole."""
        for item in self.placed:
            if not item.complete:
                with contextlib.suppress(OSError):
                    set_mark(item.tree.place, self._owner, self._migration, whole=True)

    def undo(self) -> None:
        """Remove what this move has newly made; what it has begun to renew stays, marked as not whole."""
        for item in reversed(self.placed):
            if not item.made:
                continue
            # Without a mark there is an empty directory of ours at most, or what somebody else has put there since.
            mark = mark_of(item.tree.place)
            if mark is not None and mark.migration == self._migration:
                remove(item.tree.place)
            if mark is None or mark.migration == self._migration:
                drop_mark(item.tree.place)
            for path in reversed(item.made):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def _make_directory(path: str) -> None:
    """Make one directory, no link on the way to it being followed."""
    parts = path.split("/")[1:]
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        os.mkdir(parts[-1], 0o700, dir_fd=fd)  # a tree's own is rsync's to set; nobody else looks into it before
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Remove a file or a tree that nothing writes to, if it is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.unlink(path)
