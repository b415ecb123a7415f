"""The source's half of file trees: sent ahead while the container runs; the changes are sent while it is frozen.

A tree that the container may write to is sent in passes. The first pass sends all of it. Each further one scans the
tree (files/scan.py) and sends what has changed since the scan before the previous pass. Whatever a file did while rsync
read it, the next pass therefore sends it again. The last pass runs while the container is frozen. Its rsync was started
and connected before, and waits for the names of what has changed.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from migrate import faults
from migrate.errors import DeadlineExceeded, MigrateError
from migrate.events import PassDone, Reporter
from migrate.files import receivers, tmpfs
from migrate.files import scan as tree_scan
from migrate.files.rsync import Rsync, SentTree, send_tree
from migrate.files.scan import Scan
from migrate.files.tmpfs import View
from migrate.files.trees import Root, Tree
from migrate.limits import SEED_CONNECT_TIMEOUT, SEED_STOP_TIMEOUT, SEED_TIMEOUT, VERIFY_TIMEOUT
from migrate.phases import Phase
from migrate.wire import protocol
from migrate.wire.peer import Peer
from runtime.spec.config import Spec
from runtime.state.record import State

MOST_PASSES = 8  # while the container runs
SMALL_DELTA = 1 << 20  # bytes that are not worth another pass
SMALL_COUNT = 100  # names, likewise
SHRINKING = 0.7  # a pass that leaves more than this share of what the one before had to send is the last
MOST_WAITING = 6  # rsyncs started before the freeze: sshd takes ten sessions on a connection, MaxSessions
_LINK_REMAP = re.compile(rb"(.*/)?link_remap\.[0-9]+", re.DOTALL)


@dataclass
class _Growing:
    """A tree that the container may write to."""

    tree: Tree
    renewed: bool = False
    look: Scan | None = None  # everything sent is at least as new as this scan
    now: Scan | None = None  # as it is while the container is frozen
    mapped: frozenset[int] = frozenset()  # inodes ever seen mapped: stores to them change no times
    passes: int = 0
    rsync: Rsync | None = None
    remapped: tuple[bytes, ...] = ()  # names that CRIU's dump has given to nameless files
    view: View | None = None  # of a tmpfs
    cgroup: str = ""  # what the rsync at the target runs in

    @property
    def base(self) -> Path:
        """The directory that names are relative to, here."""
        return Path(self.tree.source).parent if self.tree.single else Path(self.tree.source)

    @property
    def there(self) -> str:
        return os.path.dirname(self.tree.place) if self.tree.single else self.tree.place

    @property
    def options(self) -> tuple[str, ...]:
        return _options(self.tree)

    def note(self, init_pid: int) -> None:
        """Before a scan: note the files whose contents count, whatever their times say.

        What is mapped later changes times after the scan, except in a tmpfs.
        """
        self.mapped |= tree_scan.mapped(init_pid)
        if self.view is not None:
            self.mapped |= self.view.stored(init_pid)

    def scan(self, until: Callable[[], float] = lambda: math.inf) -> Scan:
        one = self.tree.name != ROOTFS
        return tree_scan.scan(self.tree.source, one_file_system=one, single=self.tree.single, until=until)


ROOTFS = "rootfs"


def _options(tree: Tree) -> tuple[str, ...]:
    options = ("--one-file-system",) if tree.name != ROOTFS else ()
    # A handle of a file in the lower layer, on this host's file system: at the target it names nothing or another file.
    origins = [f"--filter=-x {kind}.overlay.origin" for kind in ("trusted", "user")]  # of a mount with userxattr
    return (*options, *origins) if tree.upper else options


class Seeding:
    """The trees of one move. A context manager: leaving it ends every rsync."""

    def __init__(
        self, peer: Peer, reporter: Reporter, state: State, spec: Spec, migration: str, limit: int | None = None
    ) -> None:
        """`limit`: bytes per second while the container runs."""
        self._peer, self._reporter, self._state, self._spec, self._init = peer, reporter, state, spec, state.pid
        self._migration = migration
        self._limit = (f"--bwlimit={limit / 1024:.2f}K",) if limit is not None else ()  # a K of rsync is 1024 bytes
        self._growing: list[_Growing] = []
        self._trees: list[Tree] = []
        self._views: list[View] = []
        self._scanner: threading.Thread | None = None
        self._closing: threading.Thread | None = None
        self._until = math.inf  # a time.monotonic()
        self._scan_failure: Exception | None = None
        self.passes: list[PassDone] = []

    def __enter__(self) -> "Seeding":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every rsync, so that nothing more is written at the target. May be repeated."""
        self._until = 0.0
        if self._scanner is not None:
            self._scanner.join(SEED_STOP_TIMEOUT)
        for item in self._growing:
            if item.rsync is not None:
                item.rsync.close()
                item.rsync = None
        views, self._views = self._views, []
        _close(views)
        if self._closing is not None:
            self._closing.join(SEED_STOP_TIMEOUT)

    @faults.point("send-ahead")
    def send_ahead(self, trees: list[tuple[Tree, bool, bool]]) -> None:
        """Send what can be sent while the container runs.

        `trees`: each tree, whether the target has all of it already, and whether it has an older copy.
        """
        self._trees = [tree for tree, _, _ in trees]
        for tree, complete, renewed in trees:
            if tree.writable:
                self._growing.append(_Growing(tree, renewed))
            elif not complete:
                self._constant(tree, renewed)
        for item in self._growing:
            self._passes(item)
        if any(tree.name != ROOTFS or tree.writable for tree, _, _ in trees):
            self._peer.call(protocol.TreesSent(), VERIFY_TIMEOUT)

    def open_tmpfs(self, views: list[View]) -> list[View]:
        """Return the container's tmpfs mounts that `tmpfs` can send. `close` closes them."""
        self._views = list(views)
        return views

    def release(self) -> None:
        """Begin to close the tmpfs mounts, which nothing needs after `roots`. The kernel takes 10 to 50 ms for that."""
        views, self._views = self._views, []
        self._closing = threading.Thread(target=_close, args=[views], name="close-views", daemon=True)
        self._closing.start()

    @property
    def carried(self) -> tuple[str, ...]:
        """The mount points of the tmpfs mounts that `tmpfs` has sent."""
        return tuple(view.mounted.place for view in self._views)

    def roots(self) -> dict[str, Root]:
        """Return what the root directory of each tmpfs must have in the end, for protocol.Restore."""
        return {view.mounted.place: Root.of(view.path) for view in self._views}

    def tmpfs(self, places: Mapping[str, str], cgroup: str) -> None:
        """Send the tmpfs mounts to the `places`, by mount point, that the target has made for them.

        CRIU packs those that have no place. What arrives is charged to `cgroup`, a directory at the target, like what
        the container itself writes.
        """
        for view in [view for view in self._views if view.mounted.place not in places]:
            self._views.remove(view)
            view.close()
        for view in self._views:
            tree = Tree(f"tmpfs {view.mounted.place}", view.path, places[view.mounted.place])
            item = _Growing(tree, view=view, cgroup=cgroup)
            self._growing.append(item)
            if view.is_empty:
                item.look = item.scan()
            if item.look is None or item.look.entries.keys() > {b"."}:
                item.look = None
                self._passes(item)

    def _constant(self, tree: Tree, renewed: bool) -> None:
        """Send a tree that does not change, once. An overlay's work directory is sent empty: the kernel fills it.

        Compare the contents of what an earlier move has left there, because a power cut may have damaged files whose
        size and time are right.
        """
        options = (*_options(tree), *self._limit, *(("--exclude=/*",) if tree.empty else ()))
        options = (*options, "--checksum") if renewed else options
        if tree.single:
            with Rsync(
                self._peer, Path(tree.source).parent, os.path.dirname(tree.place), options,
                on_progress=self._progress, names=True, within=receivers.within(self._migration),
            ) as rsync:  # fmt: skip
                sent = rsync.finish(_soon(), names=os.fsencode(os.path.basename(tree.source)) + b"\0")
        else:
            sent = send_tree(
                self._peer, Path(tree.source), tree.place, on_progress=self._progress, deadline=_soon(),
                options=options, within=receivers.within(self._migration),
            )  # fmt: skip
        self._done(tree, 1, sent, sent.files)

    def _passes(self, item: _Growing) -> None:
        """Send passes until what is left is small or no longer shrinks."""
        before = -1
        while item.passes < MOST_PASSES:
            item.note(self._init)
            earlier, item.look = item.look, item.scan()
            if earlier is None:
                sent = self._whole(item)
                if "skipping file deletion" in sent.complaints:
                    item.look = None  # the target still has files that must go
                continue
            names = item.look.since(earlier, item.mapped)
            size = item.look.bytes_of(names)
            if (size <= SMALL_DELTA and len(names) <= SMALL_COUNT) or (before >= 0 and size > before * SHRINKING):
                item.look = earlier  # the last pass sends these as well
                return
            before = size
            with self._waiting(item, *self._limit) as rsync:
                self._listed(item, rsync, names, _soon(), living=True)
            item.look = item.look.with_names(names)  # rsync may have seen a file that was gone before and after
        if item.look is None:
            raise MigrateError(
                f"{item.tree.source}: changes too fast to be sent",
                remedy="try again when the container writes less",
            )

    def _whole(self, item: _Growing) -> SentTree:
        if item.tree.single:
            with self._waiting(item, *self._limit) as rsync:
                assert item.look is not None
                return self._listed(item, rsync, list(item.look.entries), _soon(), living=True)
        # A program may have set the time of a changed file back to the time that an older copy has.
        contents = ("--checksum",) if item.renewed else ()
        sent = send_tree(
            self._peer, item.base, item.there, on_progress=self._progress, deadline=_soon(),
            options=(*item.options, *self._limit, *contents), living=True, guarded=item.view is None,
            within=receivers.within(self._migration, item.cgroup),
        )  # fmt: skip
        item.passes += 1
        self._done(item.tree, item.passes, sent, sent.files)
        # rsync has scanned the tree itself. What only rsync saw, and the next scan does not, must be removed.
        assert item.look is not None
        item.look = item.look.with_names(sent.names)
        return sent

    def _waiting(self, item: _Growing, *options: str) -> Rsync:
        """Return an rsync that connects and waits for names."""
        return Rsync(
            self._peer, item.base, item.there, (*item.options, *options), on_progress=self._progress, names=True,
            guarded=not item.tree.single and item.view is None,
            within=receivers.within(self._migration, item.cgroup),
        )  # fmt: skip

    def _listed(self, item: _Growing, rsync: Rsync, names: list[bytes], deadline: float, *, living: bool) -> SentTree:
        # rsync takes a name that begins with # or ; for a comment, even between zero bytes.
        text = b"".join((b"./" if name[:1] in (b"#", b";") else b"") + name + b"\0" for name in names)
        sent = rsync.finish(deadline, living=living, names=text)
        item.passes += 1
        self._done(item.tree, item.passes, sent, len(names), frozen=not living)
        return sent

    @faults.point("start-last-pass")
    def start_last_pass(self) -> None:
        """Start the rsyncs of the last pass and wait until they have connected, shortly before the freeze."""
        sent = [item for item in self._growing if item.passes]  # what was empty is likely to stay so
        for item in sent[:MOST_WAITING]:
            item.rsync = self._waiting(item)
        for item in sent[:MOST_WAITING]:
            if item.rsync is not None:
                item.rsync.connected(SEED_CONNECT_TIMEOUT)

    def on_frozen(self, timeout: float) -> None:
        """Begin to scan for changes while CRIU dumps. No process of the container runs. `timeout` is in seconds."""
        if self._growing:
            self._until = time.monotonic() + timeout
            self._scanner = threading.Thread(target=self._scan_all, name="tree-scan", daemon=True)
            self._scanner.start()

    def _scan_all(self) -> None:
        try:
            tmpfs.verify(self._views, self._state, self._spec)
            for item in self._growing:
                if item.passes:
                    item.note(self._init)
                item.now = item.scan(lambda: self._until)
                if item.view is not None and item.view.overflowed:
                    item.mapped |= {entry[0] for entry in item.now.entries.values()}
        except (OSError, MigrateError) as error:
            self._scan_failure = error

    def send_last_pass(self, timeout: float) -> Callable[[], None] | None:
        """Begin to send what has changed, once the dump is written. `timeout` is in seconds.

        Return a function that waits until the target has all of it, or None if there is nothing to send.
        """
        if not self._growing:
            return None
        deadline = time.monotonic() + timeout
        if self._scanner is not None:
            self._scanner.join(timeout)
            if self._scanner.is_alive():
                raise DeadlineExceeded("the scan for changes in the trees did not end in time")
        if isinstance(self._scan_failure, MigrateError):
            raise self._scan_failure
        if self._scan_failure is not None:
            raise MigrateError(f"a tree cannot be read: {self._scan_failure}")
        pool = ThreadPoolExecutor(max(1, min(len(self._growing), MOST_WAITING)), thread_name_prefix="last-pass")
        futures = [pool.submit(self._last, item, deadline) for item in self._growing]
        pool.shutdown(wait=False)

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def _last(self, item: _Growing, deadline: float) -> None:
        assert item.now is not None
        assert item.look is not None
        now = item.now if item.tree.single else tree_scan.again(item.tree.source, item.now, lambda: deadline)
        new = now.entries.keys() - item.look.entries.keys()  # the scan beside the dump has seen some of CRIU's as well
        item.remapped = tuple(name for name in new if _LINK_REMAP.fullmatch(name))
        # A file that CRIU has given another name is sent with all its names, or the target would have a separate file.
        linked = {now.entries[name][0] for name in item.remapped}
        names = now.since(item.look, item.mapped | linked)
        if item.view is not None:
            # With the root's name rsync would compare every file in it. `roots` carries what the root must have.
            names = [name for name in names if name != b"."]
        if not names and not item.passes:
            return  # it was empty, and is
        if item.rsync is None:
            item.rsync = self._waiting(item)
        self._listed(item, item.rsync, names, deadline, living=False)

    @faults.point("leaving")
    def leaving(self) -> dict[str, list[str]]:
        """Return what `marks.leave` needs once the container is gone."""
        # What only the container sees (preflight/volumes.py, _replaced) goes with it.
        stay = [tree for tree in self._trees if not tree.source.startswith("/proc/")]
        trees = [tree for tree in stay if tree.writable or tree.empty]
        lasting = [item for item in self._growing if item.view is None]
        links = [os.path.join(os.fsencode(item.base), name) for item in lasting for name in item.remapped]
        return {
            "trees": [os.path.realpath(tree.source) if tree.name == ROOTFS else tree.source for tree in trees],
            "links": [os.fsdecode(path) for path in links],
        }

    def _progress(self, done: int) -> None:
        with faults.point("progress", done):
            self._reporter.progress(Phase.SEED, done)

    def _done(self, tree: Tree, number: int, sent: SentTree, count: int, *, frozen: bool = False) -> None:
        done = self._reporter.pass_done(
            tree.name, number, frozen=frozen, bytes_sent=sent.bytes_sent, files=count, seconds=sent.seconds
        )
        self.passes.append(done)


def _close(views: Iterable[View]) -> None:
    for view in views:
        view.close()


def _soon() -> float:
    return time.monotonic() + SEED_TIMEOUT
