"""The target's half of file trees: where they are put, and their fate when the move fails.

A tree is only ever put where nothing is, or where an earlier move of the same container has put it or left it, by the
mark there (marks.py, places.py). A constant one that is there already is used as it is, and never written to.
"""

import contextlib
import os
import shutil
import stat
from pathlib import Path

from migrate.disk import existing, free_bytes
from migrate.errors import MigrateError, TargetError
from migrate.files import marks, mountinfo
from migrate.files.fingerprint import fingerprint, size
from migrate.files.trees import Needed, Owner, Tree
from migrate.paths import DATA
from migrate.target import places
from migrate.target.places import Locks, Uses
from migrate.wire.protocol import CheckTrees
from migrate.wire.replies import TreeProblem, TreesChecked
from runtime.light.records import Record


def check(call: CheckTrees, owner: Owner) -> TreesChecked:
    """Say why these trees cannot be put here, and what is missing. Nothing is touched."""
    problems: list[TreeProblem] = []
    found: list[str] = []
    wanted: dict[int, tuple[Path, int]] = {}
    uses = Uses.now()
    for tree in call.trees:
        if tree.found and os.path.isfile(tree.source):
            found.append(tree.name)
            continue
        state = _state(tree, owner, uses)
        if isinstance(state, str):
            problems.append(TreeProblem("foreign-data", tree.place, state))
        elif tree.size > state:
            place = existing(Path(tree.place))
            device = place.stat().st_dev
            wanted[device] = (place, wanted.get(device, (place, 0))[1] + tree.size - state)
    for item in call.needed:
        problems += _missing(item)
    for place, count in wanted.values():
        free = free_bytes(place)
        count += call.reserved if existing(DATA).stat().st_dev == place.stat().st_dev else 0
        if free < count:
            text = f"has {free >> 20} MiB free, {(count >> 20) + 1} MiB are needed for what goes along"
            problems.append(TreeProblem("no-space", str(place), text))
    return TreesChecked(problems, found)


def _state(tree: Tree, owner: Owner, uses: Uses) -> int | str:
    """Return how many bytes of the tree are here already, or why it cannot be put there."""
    path = tree.place
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return _bad_parent(path) or _anothers(path, owner) or 0
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if _bad_parent(path):
        return _bad_parent(path)
    if stat.S_ISLNK(info.st_mode) or stat.S_ISREG(info.st_mode) != tree.single:
        return f"exists there, but is not a {'file' if tree.single else 'directory'}"
    if _matches(tree):
        return tree.size
    mark = marks.of(path)
    if (mark is None or not mark.is_of(owner)) and not (mark is None and tree.empty and not os.listdir(path)):
        return "exists, and no move of this container brought it"
    if use := uses.of(path, owner):
        return f"cannot be renewed: {use}"
    return 0 if tree.empty else size(Path(path))


def _anothers(path: str, owner: Owner) -> str:
    """Return why nothing may be made at `path`: it is within a place of another container. "" if it is not."""
    while (path := os.path.dirname(path)) != "/":
        mark = marks.of(path)
        if mark is not None and not mark.is_of(owner):
            return f"{path} belongs to container {mark.id}"
    return ""


def _matches(tree: Tree) -> bool:
    """Return whether a constant tree is at its place already, and no move has left it half renewed."""
    if not tree.fingerprint:
        return False
    mark = marks.of(tree.place)
    if mark is not None and not mark.whole:
        return False
    return _fits(tree)


def _fits(tree: Tree) -> bool:
    try:
        return fingerprint(Path(tree.place)) == tree.fingerprint
    except MigrateError:
        return False


def _bad_parent(path: str) -> str:
    """Return what keeps a directory from being made at `path`: a link or a file on the way. "" if nothing does."""
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
            return f"{current} on the way to it is not a directory"
    return ""


def _missing(needed: Needed) -> list[TreeProblem]:
    with contextlib.suppress(OSError):
        os.stat(f"{needed.path}/.")  # has an automounter mount it
    try:
        mode = os.stat(needed.path).st_mode
    except OSError:
        return [TreeProblem("missing-source", needed.path, "does not exist")]
    if stat.S_ISDIR(mode) != needed.directory:
        text = f"is {'a' if stat.S_ISDIR(mode) else 'not a'} directory there"
        return [TreeProblem("missing-source", needed.path, text)]
    mark = marks.of(needed.path)
    if mark is not None and not mark.whole:
        return [TreeProblem("missing-source", needed.path, "was left incomplete by a move that failed")]
    problem = _not_shared(needed) if needed.network else ""
    return [TreeProblem("not-shared", needed.path, problem)] if problem else []


def _not_shared(needed: Needed) -> str:
    """Return why what is here is not what the source has on its network file system, "" if it is."""
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


class Placed(Record):
    """A tree that this move puts here: `made` are the paths that did not exist, outermost first."""

    tree: Tree
    made: tuple[str, ...]
    complete: bool


class Arrivals:
    """The trees of one move into this host."""

    def __init__(self, owner: Owner, migration: str, placed: list[Placed], locks: Locks) -> None:
        self._owner, self._migration, self._locks = owner, migration, locks
        self.placed = placed

    @classmethod
    def plan(cls, trees: list[Tree], owner: Owner, migration: str, locks: Locks) -> "Arrivals":
        """Decide where each goes, and lock it; nothing is touched yet. Raises TargetError when one cannot be put there.

        One that is complete is not locked: it is only read.
        """
        placed, coming = [], set()
        for tree in trees:
            if not locks.hold(tree.place):
                raise TargetError(f"{tree.place}: another move is at work there", remedy="try again when it has ended")
        uses = Uses.now(migration)
        for tree in trees:
            state = _state(tree, owner, uses)
            if isinstance(state, str):
                raise TargetError(f"{tree.place}: {state}")
            made, path = [], tree.place
            while not os.path.lexists(path) and path not in coming:
                made.append(path)
                path = os.path.dirname(path)
            coming.update(made)
            complete = not made and _matches(tree)
            if complete:
                locks.let_go(tree.place)
            placed.append(Placed(tree, tuple(reversed(made)), complete))
        return cls(owner, migration, placed, locks)

    def make(self) -> None:
        """Make the places; from here on `undo` is needed. Raises TargetError, OSError, DeadlineExceeded."""
        for item in self.placed:
            if item.made:
                self._make(item)
            elif not item.complete:
                places.take(item.tree.place, self._owner, self._migration)
                if item.tree.empty:  # a volatile overlay is not mounted over what one has left
                    for name in os.listdir(item.tree.place):
                        _remove(os.path.join(item.tree.place, name))

    def _make(self, item: Placed) -> None:
        """Make one. Anything that exists belongs to another move, even if `plan` has not seen it: mkdir decides."""
        made: list[str] = []
        for path in item.made:
            try:
                _make_new(path, single=item.tree.single and path == item.tree.place)
                made.append(path)
            except FileExistsError:
                if path == item.tree.place:
                    raise TargetError(f"{path}: somebody else has made it meanwhile", remedy="try again") from None
        numbered = tuple((path, marks.inode(path)) for path in made)
        marks.put(item.tree.place, self._owner, self._migration, whole=False, made=numbered)

    def verify(self) -> None:
        """Check what rsync has brought of constant trees. Raises TargetError."""
        for item in self.placed:
            if item.tree.fingerprint and not item.complete and not _fits(item.tree):
                raise TargetError(
                    f"{item.tree.place} is not what the source has at {item.tree.source}",
                    remedy="did it change while it was sent? what is mounted read-only must not be written to",
                )

    def confirm(self) -> None:
        """Mark the copies as whole, because the container runs."""
        for item in self.placed:
            if not item.complete:
                with contextlib.suppress(OSError):
                    marks.put(item.tree.place, self._owner, self._migration, whole=True)

    def undo(self) -> None:
        """Abandon what this move has brought: see places.abandon. Raises DeadlineExceeded."""
        for item in reversed(self.placed):
            if not item.complete:
                places.abandon(item.tree.place, self._migration, self._locks, item.made)


def _make_new(path: str, *, single: bool) -> None:
    """Make one directory, or an empty `single` file, without following links on the way. Raises OSError."""
    parts = path.split("/")[1:]
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        if single:
            os.close(os.open(parts[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=fd))
        else:
            os.mkdir(parts[-1], 0o700, dir_fd=fd)  # a tree's own is rsync's to set; nobody else looks into it before
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    """Remove a file or a tree that nothing writes to."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.unlink(path)
