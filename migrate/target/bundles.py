"""Choose the bundle of a container that comes in: one that exists here, or a place (places.py) for a new one.

The contents of a bundle, config.json and the root file system, are compared before it is used. A bundle that no move
has made belongs to an operator or an engine: it is never removed, and never written to except for a root file system
that this very container has left there. A place whose mark names another container, or that has no mark, is taken over
only if its contents are exactly those of the container, so that nothing in it changes, and only if nothing uses it.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from migrate.disk import write_atomically
from migrate.errors import MigrateError, ProtocolError
from migrate.files import marks
from migrate.files.fingerprint import fingerprint
from migrate.files.trees import Owner
from migrate.paths import BUNDLES
from migrate.target import places
from migrate.target.places import Locks, Uses
from runtime.light.records import Record
from runtime.state import moved_mark


def parse_config(text: str) -> dict[str, Any]:
    """The config.json that came over the wire. Raises ProtocolError."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"the config.json that came is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("root"), dict):
        raise ProtocolError("the config.json that came has no root")
    return config


class Chosen(Record):
    """Where a bundle is, or comes to be.

    In a `place` its config.json is written, and what a root file system lacks; an operator's own bundle is only used.
    `made`: nothing was there before, and now an empty directory is. `complete`: the constant root file system is there
    already. `adopted`: it was nobody's, or another container's, before.
    """

    bundle: Path
    rootfs: Path
    is_place: bool
    made: bool = False
    complete: bool = False
    adopted: bool = False

    def mark(self, owner: Owner, migration: str) -> None:
        """Mark a place as this move's, which has its lock. Raises OSError, DeadlineExceeded."""
        path = str(self.bundle)
        if self.made:
            marks.put(path, owner, migration, whole=False, made=((path, marks.inode(path)),))
        elif self.is_place and (self.adopted or not self.complete):
            places.take(path, owner, migration, whole=self.complete)


class Chooser:
    """Finds the bundle of a container that comes in. `notes` say afterwards what it has left alone, and why."""

    def __init__(self, config: dict[str, Any], expected: str, owner: Owner, migration: str, locks: Locks) -> None:
        """`expected` is the fingerprint of the root file system, "" for one that the container may write to."""
        self._config, self._expected = config, expected
        self._owner, self._migration, self._locks = owner, migration, locks
        self.notes: list[str] = []

    def choose(self, hints: Iterable[str]) -> Chosen:
        """The first bundle of `hints` that fits, or a place. It is locked, unless it is only read, and not marked yet.

        Raises OSError, DeadlineExceeded.
        """
        for hint in map(Path, hints):
            if hint.is_absolute() and ".." not in hint.parts and not moved_mark.is_marked(str(hint)):
                found = self._place(hint) if hint.parent == BUNDLES else self._operators(hint)
                if found is not None:
                    return found
        for number in itertools.count(1):
            name = self._owner.id if number == 1 else f"{self._owner.id}.{number}"
            if (found := self._place(BUNDLES / name, make=True)) is not None:
                return found
        raise AssertionError

    def _operators(self, bundle: Path) -> Chosen | None:
        """A bundle that no move has made, if it fits: many containers may read it, but only one may write to it."""
        rootfs = self._fitting(bundle)
        if rootfs is None or Path(os.path.realpath(BUNDLES)) in rootfs.parents:
            return None
        mark = marks.of(str(rootfs))
        if self._expected:
            whole = mark is None or mark.whole
            return Chosen(bundle, rootfs, is_place=False, complete=True) if whole else None
        if mark is None or not mark.is_of(self._owner) or not self._locks.hold(str(rootfs)):
            return None
        if Uses.now(self._migration).of(str(rootfs), self._owner):
            self._locks.let_go(str(rootfs))
            return None
        return Chosen(bundle, rootfs, is_place=False)

    def _place(self, bundle: Path, *, make: bool = False) -> Chosen | None:
        """Return the place `bundle` if it is free or belongs to the container, else None. `make` it if need be."""
        path = str(bundle)
        if not self._locks.hold(path):
            return None
        chosen = None
        try:
            chosen = self._new(bundle) if make else None
            if chosen is None and bundle.is_dir() and not bundle.is_symlink():
                chosen = self._old(bundle)
        finally:
            if chosen is None:
                self._locks.let_go(path)
        return chosen

    def _new(self, bundle: Path) -> Chosen | None:
        """Make the place and return it; None if something exists there. Only mkdir decides whether it is free."""
        path = str(bundle)
        BUNDLES.mkdir(mode=0o700, parents=True, exist_ok=True)
        if marks.of(path) is None:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # a move that was killed at once may have left an empty one
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return None
        return Chosen(bundle, bundle / "rootfs", is_place=True, made=True)

    def _old(self, bundle: Path) -> Chosen | None:
        """A place that is there, if it is the container's own, or nobody's and just what is wanted."""
        path, rootfs = str(bundle), bundle / "rootfs"
        mark, inner = marks.of(path), marks.of(str(rootfs))
        if use := Uses.now(self._migration).of(path, self._owner):
            if mark is None:
                self.notes.append(f"{path} is left alone: {use}")
            return None
        if mark is None and inner is not None:  # of an earlier version, which marked only what containers write to
            mark = inner
        if rootfs.is_symlink():
            return None
        if mark is not None and mark.is_of(self._owner):
            return Chosen(bundle, rootfs, is_place=True, complete=mark.whole and self._is_expected(rootfs))
        fits = bool(self._expected) and inner is None and self._fitting(bundle) == rootfs.resolve()
        if fits and (mark is None or mark.whole):
            return Chosen(bundle, rootfs, is_place=True, complete=True, adopted=True)
        if mark is None:
            words = f"no mark says whose it is, and it is not what {self._owner.id} needs"
            self.notes.append(f"{path} is left alone: {words}")
        return None

    def _fitting(self, bundle: Path) -> Path | None:
        """The root file system of a bundle that has the same config, but for root.path; None when it differs."""
        try:
            here = json.loads((bundle / "config.json").read_bytes())
            rootfs: Path = bundle / here["root"]["path"]
            here["root"]["path"] = self._config["root"].get("path")
            if here != self._config or (self._expected and not self._is_expected(rootfs)):
                return None
            return rootfs.resolve()
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_expected(self, rootfs: Path) -> bool:
        try:
            return bool(self._expected) and fingerprint(rootfs) == self._expected
        except MigrateError:
            return False


def write_config(bundle: Path, config: dict[str, Any]) -> None:
    """Write the config.json of a place, whose root file system is `rootfs`. Raises OSError."""
    config["root"]["path"] = "rootfs"
    write_atomically(bundle / "config.json", json.dumps(config, indent=4).encode())
