"""The source's side of a move. Who may die when, and what happens then, is told in phases.py."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from criu_rpc.errors import Error
from migrate import faults
from migrate.errors import InDoubt, MigrateError, MovedDirty, MoveFailed, RolledBack
from migrate.events import Monitor, Report
from migrate.files import marks
from migrate.files.trees import Owner, Tree
from migrate.interrupts import uninterruptible
from migrate.journal import journal
from migrate.journal.under_way import UnderWay
from migrate.limits import (
    ANSWER_GRACE,
    CONFIRM_TIMEOUT,
    CONTAINER_LOCK_TIMEOUT,
    FINGERPRINT_TIMEOUT,
    PASSING_PATIENCE,
    RESUME_TIMEOUT,
)
from migrate.model import Compression, MigrationMode, MigrationSpec
from migrate.phases import OPEN, Phase
from migrate.preflight import processes as process_scan
from migrate.preflight.container import wait_settled
from migrate.source import history, leftovers, memory
from migrate.source.memory import MovingMemory
from migrate.source.ready import Preflight, Ready
from migrate.source.seeding import ROOTFS, Seeding
from migrate.source.settle import clean_source, clean_target, save_log, settle
from migrate.source.switchover import Aftermath, Frozen, Switchover
from migrate.wire import codec, protocol, replies
from migrate.wire.ahead import Ahead
from migrate.wire.peer import Session
from runtime.checkpoint import options as criu_options
from runtime.state.record import State
from runtime.state.store import Store

MOST_HINTS = 8


def move(store: Store, wanted: MigrationSpec, monitor: Monitor, session: Session | Ahead | None = None) -> Report:
    """Move a container, over the connection of `session` if there is one.

    Raises Blocked and connection errors before anything is touched, MoveFailed after.
    """
    migration = journal.new_migration_id()
    under_way = UnderWay(monitor, migration, id=wanted.id, root=store.root, target=wanted.host)
    preflight = Preflight(store, wanted, under_way, migration, session)
    with (
        preflight.reporter.naming_errors(),
        store.lock(wanted.id, CONTAINER_LOCK_TIMEOUT),
        under_way,
        preflight.run() as ready,
        Move(ready, under_way.require_wanted) as begun,
    ):
        return begun.run()


class Move:
    """A move that has begun.

    A context manager: leaving it by an error rolls the move back, unless the journal says COMMITTED, and raises a
    MoveFailed that says where the container is.
    """

    def __init__(self, ready: Ready, require_wanted: Callable[[], None] = lambda: None) -> None:
        """`require_wanted` raises an error if the move is to be cancelled; it is the last check before COMMITTED."""
        self._require_wanted = require_wanted
        self._store, self._wanted, self._plan, self._digest = ready.store, ready.wanted, ready.plan, ready.digest
        self._state, self._spec, self._peer, self._log = ready.state, ready.spec, ready.peer, ready.log
        self._reporter, self._clock = ready.reporter, ready.clock
        self._seeding = Seeding(
            ready.peer, ready.reporter, ready.state, ready.spec, ready.log.entry.migration,
            ready.wanted.bandwidth_limit,
        )  # fmt: skip
        self._aftermath = Aftermath()
        self._early = ready.early
        self._size = 0  # bytes of memory, about
        self._memory: MovingMemory | None = None
        self._mode, self._why = MigrationMode.STOP_AND_COPY, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None and self._memory is not None:
                self._memory.unthrottle()  # before a clean-up that may take its time
            if error is not None and not isinstance(error, MoveFailed):
                raise self._failed(error) from error
        finally:
            if self._memory is not None:
                self._memory.__exit__(None, None, None)
            self._seeding.close()

    def run(self) -> Report:
        """Bring the move to its end. Raises MoveFailed, or what stopped it: leaving the `with` then rolls back."""
        on_disk = self._seed()
        self._pre_copy(on_disk)
        with self._switchover() as switchover, switchover.undone_by_failure(self._aftermath):
            frozen = self._stop_and_copy(switchover)
            self._confirm(frozen)
            with uninterruptible():
                leaving = self._commit(frozen)
                resumed_at = self._hand_over(switchover, frozen, leaving)
                return self._finish(resumed_at - frozen.at, switchover)

    @faults.point("seed")
    def _seed(self) -> str:
        """Send the bundle and the trees, and have the target make everything around the container.

        Return why the target cannot keep images in memory, or "".
        """
        self._log.record(Phase.SEED)
        self._reporter.phase(Phase.SEED, "root file system")
        leftovers.discard(self._peer, self._log, self._reporter)
        place = self._open_bundle()
        self._send_trees(place)
        on_disk = self._prepare(place)
        self._clock.step("seed")
        return on_disk

    def _open_bundle(self) -> replies.Opened:
        """Ask the target where the bundle and each tree go, and which of them it has already."""
        state, move = self._state, self._log.entry
        config = self._plan.config(self._spec.config)
        hints = [state.bundle, *state.bundle_hints]
        call = protocol.OpenBundle(
            move.migration, move.source, state.id, state.created, config, self._digest, hints, list(self._plan.trees)
        )  # fmt: skip
        place = self._peer.call(call, FINGERPRINT_TIMEOUT)
        for note in place.notes:
            self._reporter.warn(f"{self._wanted.host}: {note}")
        return place

    def _send_trees(self, place: replies.Opened) -> None:
        rootfs = Tree(ROOTFS, self._state.rootfs, place.rootfs, fingerprint=self._digest)
        complete = [place.complete, *place.trees]
        self._seeding.send_ahead(list(zip([rootfs, *self._plan.trees], complete, place.renewed, strict=True)))
        if not place.complete and self._digest:
            self._peer.call(protocol.BundleSent(self._digest), FINGERPRINT_TIMEOUT)

    def _prepare(self, place: replies.Opened) -> str:
        """Have the target make cgroup, network, monitor and a waiting CRIU; send the contents of tmpfs mounts.

        Return why the target cannot keep images in memory, or "".
        """
        state = self._state
        carried = protocol.Carried(self._spec.annotations, state.created, _hints(state, place.bundle), state.resources)
        self._size = process_scan.memory_bytes(state.pid)
        mounts = [view.mounted for view in self._seeding.open_tmpfs(self._early.take_views())]
        prepare = protocol.Prepare(
            carried, list(state.stdio), self._wanted.tcp_close, self._wanted.timeout, mounts,
            self._size, memory.may_be_lazy(self._wanted, state.pid, self._spec),
        )  # fmt: skip
        ready = self._peer.call(prepare)
        if ready.on_disk:
            words = f"until {state.id} runs there its memory is on the disk of {self._wanted.host}"
            self._reporter.warn(f"{words}: {ready.on_disk}")
        self._seeding.tmpfs(ready.tmpfs, ready.cgroup)
        return ready.on_disk

    @faults.point("pre-copy")
    def _pre_copy(self, on_disk: str) -> None:
        """Send memory while the container runs, unless all of it goes in the freeze."""
        self._mode, self._why = memory.choose(self._wanted, on_disk)
        self._reporter.mode(self._mode, self._why)
        if self._mode is MigrationMode.PRE_COPY and self._early.injector is not None:
            self._log.record(Phase.PRE_COPY)
            self._reporter.phase(Phase.PRE_COPY, f"memory of {self._wanted.id}")
            self._memory = MovingMemory(
                self._peer, self._reporter, self._state, self._wanted, self._size, self._early.injector,
                remapped="user" in self._spec.namespaces,
            )  # fmt: skip
            self._memory.send_rounds()
            if self._memory.lazy_problem:
                words = f"{self._wanted.id} is resumed when all memory is in place: {self._memory.lazy_problem}"
                self._reporter.warn(words)
            self._clock.step("pre-copy")

    @property
    def _is_lazy(self) -> bool:
        """Whether the target resumes the container before its memory is in place."""
        return self._memory is not None and not self._memory.lazy_problem

    def _switchover(self) -> Switchover:
        return Switchover(
            self._state,
            self._spec,
            self._peer,
            lambda done: self._reporter.progress(Phase.STOP_AND_COPY, done),
            timeout=self._wanted.timeout,
            tcp_close=self._wanted.tcp_close,
            carried=self._seeding.carried,
            lazy=self._memory is not None,
            clean=self._memory.clean if self._memory is not None else None,
            compress=self._compression(),
            shared=self._memory.shared if self._memory is not None else None,
        )

    def _compression(self) -> Compression:
        """Return that of CRIU's page stream: as the memory before it, if there was any, because that knows the link."""
        if self._memory is not None:
            return Compression.ZSTD if self._memory.compresses else Compression.NONE
        return codec.settle(self._wanted.compress, self._peer.offers, self._wanted.host)

    @faults.point("stop-and-copy")
    def _stop_and_copy(self, switchover: Switchover) -> Frozen:
        """Freeze the container, and send everything, until the target holds the restored tree."""
        self._log.record(Phase.STOP_AND_COPY)
        self._reporter.phase(Phase.STOP_AND_COPY, f"freezing {self._wanted.id}")
        frozen = self._freeze(switchover)
        images = self._copy(switchover, frozen)
        self._restore(frozen, images)
        self._log.record(Phase.PREPARED, durable=False)
        return frozen

    def _freeze(self, switchover: Switchover) -> Frozen:
        """Start what the last pass needs, then dump the container while its pages stream to the target."""
        wanted = self._wanted
        self._peer.call(protocol.PagesBegin(self._peer.digest))
        self._seeding.start_last_pass()
        self._clock.step("prepare")
        switchover.close_gate()
        wait_settled(self._state, wanted.allow, PASSING_PATIENCE)
        self._peer.limit(wanted.timeout)

        def on_frozen() -> None:
            if self._memory is not None:
                self._memory.send_last()
            self._seeding.on_frozen(wanted.timeout)

        def before() -> None:
            if self._memory is not None:
                self._memory.unthrottle()  # CRIU runs code in the container's processes

        frozen = switchover.freeze(on_frozen, before=before, skip_in_flight="tcp-backlog" in wanted.allow)
        self._clock.step("start criu", until=frozen.at)
        self._clock.step("dump")
        return frozen

    def _copy(self, switchover: Switchover, frozen: Frozen) -> int:
        """Send the images and, at the same time, what has changed in the trees. Return how many images there are."""
        files_there = self._seeding.send_last_pass(frozen.left())
        self._peer.limit(frozen.left())
        self._peer.post(frozen.pages)
        images = switchover.send_images(frozen.deadline)
        self._peer.answer(frozen.left())
        self._clock.step("images")
        if self._memory is not None:
            end = self._memory.complete(frozen.lazy, frozen.left())
            self._peer.call(end, frozen.left())
            self._clock.step("memory")
        if files_there is not None:
            files_there()
            self._clock.step("files")
        return images

    def _restore(self, frozen: Frozen, images: int) -> None:
        """Have the target restore the tree and hold it."""
        left = frozen.left()
        restore = protocol.Restore(images, left, self._is_lazy, self._seeding.roots())
        with faults.point("ask-restore"):
            self._peer.post(restore)
        self._seeding.release()
        self._peer.answer(left + ANSWER_GRACE)
        self._peer.limit()
        self._clock.step("restore")

    def _confirm(self, frozen: Frozen) -> None:
        """Ask the target once more whether it holds the tree, so that a cut shows before the point of no return."""
        self._peer.call(protocol.Confirm(), min(CONFIRM_TIMEOUT, frozen.left()))
        self._clock.step("confirm")

    def _commit(self, frozen: Frozen) -> dict[str, list[str]]:
        """Pass the point of no return. Return what `marks.leave` needs once the container is gone."""
        leaving = self._seeding.leaving()
        self._require_wanted()
        frozen.dump.require_frozen()  # if CRIU was killed, the container may have run on
        self._log.record(Phase.COMMITTED, leaving=leaving)
        self._clock.step("commit")
        return leaving

    @faults.point("hand-over")
    def _hand_over(self, switchover: Switchover, frozen: Frozen, leaving: dict[str, list[str]]) -> float:
        """End the container here, then have the target resume it. Return when that was (time.monotonic())."""
        state, log = self._state, self._log
        switchover.kill_source(
            frozen, lambda: log.record(Phase.COMMITTED, durable=False, killed=True), self._reporter.warn,
            shares_files=bool(self._plan.needed),
        )  # fmt: skip
        self._clock.step("source ends")
        try:
            self._peer.call(protocol.Resume(), RESUME_TIMEOUT)
        except Error as error:
            self._reporter.warn(f"the target did not confirm: {error}; asking again over a new connection")
            settle(log)
        resumed_at = time.monotonic()
        self._clock.step("resume")
        if self._early.injector is not None:
            self._early.injector.release()
        marks.leave(leaving, Owner(state.id, state.created, self._store.root), log.entry.migration)
        return resumed_at

    def _finish(self, downtime: float, switchover: Switchover) -> Report:
        """The container runs at the target: journal that, clean up here, report."""
        wanted, move = self._wanted, self._log.entry
        if self._log.phase is not Phase.RESUMED:
            self._log.record(Phase.RESUMED, **self._figures(downtime))
        if dropped := switchover.dropped_watches():
            words = f"{dropped} inotify or fanotify descriptor{'s' if dropped > 1 else ''} had events waiting"
            self._reporter.warn(f"{words} when {wanted.id} was frozen: they are lost, later ones are not")
        self._reporter.phase(Phase.RESUMED, f"{wanted.id} runs at {wanted.host}; cleaning up")
        leftover = clean_source(self._store, self._state, self._peer, switchover.reap)
        self._clock.step("clean-up")
        rounds = tuple(self._memory.reported) if self._memory is not None else ()
        before = self._memory.carried_bytes if self._memory is not None else (0, 0)
        beside = self._memory.bytes_sent if self._memory is not None else 0
        report = Report(
            id=wanted.id,
            migration=move.migration,
            source=move.source,
            target=wanted.host,
            mode=str(self._mode),
            workload="TARGET",
            downtime_s=downtime,
            total_s=self._clock.total(),
            bytes_sent=sum(item.bytes_sent for item in self._seeding.passes) + self._peer.bytes_sent + beside,
            phases=self._clock.steps,
            passes=tuple(self._seeding.passes),
            mode_reason=self._why,
            rounds=rounds,
            expected_gap_s=rounds[-1].expected_gap if rounds else None,
            memory_bytes=switchover.carried_bytes[0] + before[0],
            memory_sent=switchover.carried_bytes[1] + before[1],
        )
        self._reporter.emit(report)
        if leftover is not None:
            raise MovedDirty(
                f"container {wanted.id} runs at {wanted.host}, but what is left here cannot be removed: {leftover}",
                cause=leftover, remedy=f"pymigrate delete --force {wanted.id}",
            )  # fmt: skip
        return report

    def _figures(self, downtime: float) -> dict[str, Any]:
        """Return what the predictions of later moves learn from, as fields of the journal."""
        return history.fields(self._memory.measured(downtime, self._clock.total())) if self._memory is not None else {}

    def _failed(self, error: BaseException) -> MoveFailed:
        """Roll back if the move has not been committed. Return what to tell the user: where the container is."""
        container = self._state.id
        if self._log.phase is Phase.RESUMED:
            return MovedDirty(
                f"container {container} runs at {self._wanted.host}, but the move did not end here: {error}",
                cause=error, remedy=f"pymigrate delete --force {container}",
            )  # fmt: skip
        if self._log.phase in OPEN:
            return InDoubt(
                f"container {container}: the move stopped after the point of no return: {error}",
                cause=error,
                remedy=f"pymigrate recover {container}",
            )
        with uninterruptible():
            self._seeding.close()
            return self._roll_back(error)

    def _roll_back(self, error: BaseException) -> RolledBack:
        """Clean the target, and journal the end. The container already runs here again: `undone_by_failure`."""
        here = self._log.entry.source
        cleaned = clean_target(self._peer, self._log)
        remedy = getattr(error, "remedy", None)
        notes = [remedy] if remedy else []
        try:
            self._log.record(Phase.ABORTED, reason=str(error), cleaned=cleaned)
        except MigrateError as unwritten:
            notes.append(str(unwritten))
        if saved := save_log(self._aftermath.criu_log, self._log.entry.migration):
            notes.append(f"CRIU's log: {saved}")
        if not cleaned:
            notes.append(f"{self._wanted.host} could not be cleaned: the next move to it does that")
        alive = criu_options.is_running(self._state)
        where = f"it runs here, at {here}, as before" if alive else f"it has exited here, at {here}"
        if alive and self._aftermath.damage:
            where = f"it runs here, at {here}, but is damaged ({self._aftermath.damage})"
        failed = RolledBack(
            f"container {self._state.id} was not moved, {where}: {error or type(error).__name__}",
            cause=error, remedy="\n".join(notes) or None,
        )  # fmt: skip
        if not alive:
            failed.workload = "NEITHER"
        return failed


def _hints(state: State, place: str) -> list[str]:
    """Return where the bundle is on the hosts that the container has been to, newest last, without its new place."""
    known = [*state.bundle_hints, state.bundle]
    return [path for path in dict.fromkeys(known) if path != place][-MOST_HINTS:]
