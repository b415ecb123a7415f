"""The files of a move into this host, its bundle and the trees beside it: their places and their fate.

`plan` locks the places (bundles.py, trees.py) until the container runs or the move is undone. The journal has all that
another agent needs to continue.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, Self

from migrate.errors import TargetError
from migrate.files import marks
from migrate.files.fingerprint import fingerprint
from migrate.files.trees import Owner
from migrate.journal.journal import Entry
from migrate.target import bundles, places
from migrate.target.bundles import Chooser, Chosen
from migrate.target.places import Locks
from migrate.target.trees import Arrivals, Placed
from migrate.wire import records
from migrate.wire.protocol import OpenBundle
from migrate.wire.replies import Opened
from runtime.linux import syscalls


class Arriving:
    """The files of one move.

    `place`: the bundle if this move fills it, otherwise ""; `made`: the directories of it that this move has made.
    `rootfs`: the root file system if the container may write to it, otherwise "".
    """

    def __init__(self, owner: Owner, migration: str, bundle: Path, trees: Arrivals, locks: Locks) -> None:
        self._owner, self._migration, self.bundle = owner, migration, bundle
        self._trees, self._locks = trees, locks
        self._place = self._rootfs = ""
        self._made: list[str] = []
        self._chosen: tuple[Chosen, dict[str, Any]] | None = None  # with the config.json for a place, until it is made

    @classmethod
    def plan(cls, call: OpenBundle, owner: Owner) -> tuple[Self, Opened]:
        """Find the bundle at a hint, or make a place for it, and find places for the trees.

        Return the reply to OpenBundle beside it. Raises ProtocolError, TargetError, OSError; `undo` is needed after.
        """
        config, locks = bundles.parse_config(call.config), Locks()
        try:
            trees = Arrivals.plan(call.trees, owner, call.migration, locks)
            chooser = Chooser(config, call.fingerprint, owner, call.migration, locks)
            chosen = chooser.choose(call.hints)
        except BaseException:
            locks.release()
            raise
        files = cls(owner, call.migration, chosen.bundle, trees, locks)
        files._rootfs = str(chosen.rootfs) if not call.fingerprint else ""
        if chosen.is_place:
            files._chosen = chosen, config
        if chosen.is_place and not chosen.complete:
            files._place, files._made = str(chosen.bundle), [str(chosen.bundle)] if chosen.made else []
        return files, Opened(
            str(chosen.bundle), str(chosen.rootfs), chosen.complete,
            trees=[item.complete for item in trees.placed],
            renewed=[not chosen.made, *(not item.made for item in trees.placed)],
            notes=list(dict.fromkeys(chooser.notes)),
        )  # fmt: skip

    @classmethod
    def resume(cls, entry: Entry, owner: Owner) -> Self:
        """Continue from the journal of a move.

        Journals of earlier versions name no place: what those versions made has no mark either, and stays.
        """
        fields, locks = entry.fields, Locks()
        what = f"the journal of migration {entry.migration}"
        placed = [records.decode(Placed, item, what) for item in fields.get("trees", [])]
        for item in placed:
            item.tree.check()
        trees = Arrivals(owner, entry.migration, placed, locks)
        files = cls(owner, entry.migration, Path(fields["bundle"]), trees, locks)
        files._rootfs = str(fields.get("rootfs", ""))
        files._place, files._made = str(fields.get("place", "")), list(fields.get("made", ()))
        return files

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that `resume` needs in the journal."""
        return {
            "bundle": str(self.bundle), "place": self._place, "made": self._made, "rootfs": self._rootfs,
            "trees": records.encode(self._trees.placed),
        }  # fmt: skip

    def make(self) -> None:
        """Make what rsync is to fill. The journal must have `fields` by now.

        Raises TargetError, OSError, DeadlineExceeded.
        """
        if self._chosen is not None:
            chosen, config = self._chosen
            chosen.mark(self._owner, self._migration)
            chosen.rootfs.mkdir(mode=0o755, exist_ok=True)
            bundles.write_config(chosen.bundle, config)
        if self._rootfs:
            places.take(self._rootfs, self._owner, self._migration)
        self._trees.make()

    def bundle_sent(self, expected: str) -> None:
        """Check what rsync has brought. From here on the place is whole, and need not be sent again.

        Raises TargetError, OSError.
        """
        rootfs = self.bundle / "rootfs"
        if fingerprint(rootfs) != expected:
            raise TargetError(
                f"the root file system in {rootfs} differs from the source's",
                remedy="did it change while it was sent? a read-only root file system must not be written to",
            )
        if self._place:
            _sync(self._place)
            marks.put(self._place, self._owner, self._migration, whole=True)

    def trees_sent(self) -> None:
        """Check what must not have changed, and wait until the disks have what has come so far.

        Raises TargetError, OSError.
        """
        self._trees.verify()
        self.flush()

    def flush(self) -> None:
        """Wait until the disks have what has come so far, but for a constant root file system. Raises OSError."""
        coming = (item.tree.place for item in self._trees.placed if not item.complete)
        for path in {self._rootfs, *map(os.path.dirname, coming)} - {""}:
            _sync(path)

    def confirm(self) -> None:
        """Mark the copies as whole and unlock the places, because the container runs and its use of them shows."""
        self._trees.confirm()
        if self._rootfs:
            with contextlib.suppress(OSError):  # it runs; the next move sends more than it needs to, no worse
                marks.put(self._rootfs, self._owner, self._migration, whole=True)
        self._locks.release()

    def note_use(self) -> None:
        """Note that what the container uses as it was is no longer what a failed move has left."""
        whole = (item.tree.place for item in self._trees.placed if item.complete)
        for path in (str(self.bundle), *whole):
            with contextlib.suppress(OSError):
                places.ran(path, self._owner)

    def undo(self) -> None:
        """Abandon what this move has brought: see places.abandon. Nothing may write there any longer.

        Raises DeadlineExceeded.
        """
        try:
            self._trees.undo()
            if self._place:
                places.abandon(self._place, self._migration, self._locks, self._made)
        finally:
            self._locks.release()


def _sync(directory: str) -> None:
    """Wait until the disk has all of the file system that a directory is on. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)
