"""The source's side of a move: preflight, seed, switch-over, and what to do when any of it fails.

Before COMMITTED every failure ends with the container running here as if nothing had happened. From COMMITTED on
it does not run here again (unless we are killed before we end it, see recover.py); if the target's confirmation is
missing the move is settled over a new connection, and if that fails too it is in doubt: both sides keep what they have,
and `pymigrate recover` finishes it.
"""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from criu_rpc.errors import Error
from migrate.errors import DeadlineExceeded, InDoubt, MigrateError, MovedDirty, MoveFailed, RolledBack
from migrate.events import Monitor, PassDone, PhaseStarted, Progress, Report, Warned
from migrate.files import marks
from migrate.files.fingerprint import fingerprint
from migrate.files.trees import Owner, Tree
from migrate.interrupts import uninterruptible
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.journal.undecided import frozen_tree, undecided
from migrate.model import MigrationSpec
from migrate.phases import OPEN, Phase, workload
from migrate.preflight import landlock, volumes
from migrate.preflight import processes as process_scan
from migrate.preflight.container import container_blockers, wait_settled
from migrate.preflight.target import preflight
from migrate.preflight.volumes import Plan
from migrate.source.seeding import ROOTFS, Seeding
from migrate.source.settle import clean_source, clean_target, save_log, settle
from migrate.source.switchover import Switchover
from migrate.wire import protocol
from migrate.wire.peer import Peer, RemoteFailure, connect
from runtime.checkpoint import options as criu_options
from runtime.freeze import mend, syn_gate
from runtime.spec import config as spec_config
from runtime.spec.config import Spec
from runtime.state import moved_mark
from runtime.state.kept_config import load_kept
from runtime.state.record import State
from runtime.state.store import Store

LOCK_TIMEOUT = 5.0
FINGERPRINT_TIMEOUT = 600.0
CONFIRM_TIMEOUT = 10.0  # while the container is frozen
RESUME_TIMEOUT = 30.0
ANSWER_GRACE = 2.0  # for the target to say itself what did not end in time
PATIENCE = 2.0  # for what passes by itself, such as a connection that is about to be accepted


class _Clock:
    """Durations of the steps of one move, on the monotonic clock."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.steps: dict[str, float] = {}

    def step(self, name: str, *, until: float | None = None) -> None:
        """The time since the last step, up to now or `until`, was spent on `name`."""
        now = time.monotonic() if until is None else until
        self.steps[name] = self.steps.get(name, 0.0) + now - self._last
        self._last = now


class Coordinator:
    """One move of one container to one host."""

    # Known from preflight on.
    _state: State
    _spec: Spec
    _peer: Peer
    _log: Journal
    _seeding: Seeding

    def __init__(self, store: Store, wanted: MigrationSpec, monitor: Monitor) -> None:
        self._store, self._wanted, self._monitor = store, wanted, monitor
        self._clock = _Clock()
        self._migration = journal.new_migration_id()
        self._source = socket.gethostname()
        self._passes: tuple[PassDone, ...] = ()
        self._frozen_at = 0.0
        self._resumed_at = 0.0

    def run(self) -> Report:
        """Move the container. Raises Blocked and connection errors before anything is touched, MoveFailed after."""
        wanted = self._wanted
        with self._store.lock(wanted.id, LOCK_TIMEOUT):
            state = self._store.load(wanted.id)
            if (entry := undecided(self._store, wanted.id, state.created)) is not None:
                raise MigrateError(
                    f"container {wanted.id}: an earlier move of it, to {entry.target}, is not decided yet",
                    remedy=f"pymigrate recover {wanted.id}",
                )
            mend.repair_left(state)
            spec = load_kept(state)
            self._say(Phase.PREFLIGHT, f"checking {wanted.id} and {wanted.host}")
            plan = volumes.plan(state, spec, wanted.volumes)
            blockers = container_blockers(self._store, state, spec, tcp_close=wanted.tcp_close, patience=PATIENCE)
            with connect(wanted.host, root=str(self._store.root)) as peer:
                digest = fingerprint(Path(state.rootfs)) if spec.readonly else ""
                spec = plan.spec(spec_config.elsewhere(spec, wanted.net))
                plan = preflight(peer, self._store, state, spec, wanted.allow, blockers, plan)
                if words := landlock.warning(wanted.id, landlock.suspects(state.pid, spec)):
                    self._monitor.emit(Warned(words))
                self._clock.step("preflight")
                log = Journal.begin(
                    self._migration, role="source", id=wanted.id, source=self._source, target=wanted.host,
                    root=str(self._store.root), created=state.created, **frozen_tree(state),
                )  # fmt: skip
                with Seeding(peer, self._monitor, state, self._migration) as seeding:
                    self._state, self._spec, self._peer, self._log, self._seeding = state, spec, peer, log, seeding
                    return self._move(digest, plan)

    def _move(self, digest: str, plan: Plan) -> Report:
        criu_log, damage = b"", ""
        try:
            self._seed(digest, plan)
            with Switchover(
                self._state,
                self._spec,
                self._peer,
                self._on_pages,
                tcp_close=self._wanted.tcp_close,
                carried=self._seeding.carried,
            ) as departure:
                try:
                    self._stop_and_copy(departure)
                    self._peer.call(protocol.Confirm(), min(CONFIRM_TIMEOUT, self._left()))
                    self._clock.step("confirm")
                    with uninterruptible():
                        leaving = self._seeding.leaving()
                        departure.require_frozen()
                        self._log.record(Phase.COMMITTED, leaving=leaving)
                        self._clock.step("commit")
                        self._hand_over(departure, leaving)
                        self._passes = tuple(self._seeding.passes)
                        return self._finish(departure.dropped_watches())
                except BaseException:
                    with uninterruptible():
                        departure.roll_back()  # no effect after kill_source
                        criu_log, damage = departure.log(), departure.damage
                    raise
        except MoveFailed:
            raise
        except BaseException as error:
            if self._log.phase is Phase.RESUMED:
                raise MovedDirty(
                    f"container {self._state.id} runs at {self._wanted.host}, but the move did not end here: {error}",
                    cause=error, remedy=f"pymigrate delete --force {self._state.id}",
                ) from error  # fmt: skip
            if self._log.phase in OPEN:
                raise InDoubt(
                    f"container {self._state.id}: the move stopped after the point of no return: {error}",
                    cause=error,
                    remedy=f"pymigrate recover {self._state.id}",
                ) from error
            with uninterruptible():
                self._seeding.close()
                self._roll_back(criu_log, damage, error)
            raise

    def _seed(self, digest: str, plan: Plan) -> None:
        """Bundle and root file system to the target, and everything made ready there."""
        self._log.record(Phase.SEED)
        self._say(Phase.SEED, "root file system")
        self._discard_leftovers()
        config = plan.config(self._spec.config)
        hints = [self._state.bundle, *self._state.bundle_hints]
        trees = [tree.to_json() for tree in plan.trees]
        call = protocol.OpenBundle(
            self._migration, self._source, self._state.id, self._state.created, config, digest, hints, trees
        )  # fmt: skip
        place = self._peer.call(call, FINGERPRINT_TIMEOUT)
        for note in place["notes"]:
            self._monitor.emit(Warned(f"{self._wanted.host}: {note}"))
        rootfs = Tree(ROOTFS, self._state.rootfs, str(place["rootfs"]), fingerprint=digest)
        complete = [bool(place["complete"]), *map(bool, place["trees"])]
        renewed = map(bool, place["renewed"])
        self._seeding.send_ahead(list(zip([rootfs, *plan.trees], complete, renewed, strict=True)))
        if not place["complete"] and digest:
            self._peer.call(protocol.BundleSent(digest), FINGERPRINT_TIMEOUT)
        carried = {
            "annotations": self._spec.annotations, "created": self._state.created,
            "bundle_hints": _hints(self._state, place), "resources": self._state.resources,
        }  # fmt: skip
        mounts = [view.mounted.to_json() for view in self._seeding.open_tmpfs(self._spec)]
        prepare = protocol.Prepare(
            carried, list(self._state.stdio), self._wanted.tcp_close, self._wanted.timeout, mounts,
            process_scan.memory_bytes(self._state.pid),
        )  # fmt: skip
        ready = self._peer.call(prepare)
        if ready["on_disk"]:
            words = f"until {self._state.id} runs there its memory is on the disk of {self._wanted.host}"
            self._monitor.emit(Warned(f"{words}: {ready['on_disk']}"))
        self._seeding.tmpfs(ready["tmpfs"], ready["cgroup"])
        self._clock.step("seed")

    def _discard_leftovers(self) -> None:
        """Have the target remove what it has of moves that were aborted here when it could not be told."""
        uncleaned = list(_uncleaned(self._wanted, str(self._store.root), self._migration))
        if not uncleaned:
            return
        try:
            self._peer.call(protocol.Discard([entry.migration for entry in uncleaned]), FINGERPRINT_TIMEOUT)
        except RemoteFailure as error:
            self._monitor.emit(Warned(f"{self._wanted.host} still has images of a move that was aborted: {error}"))
            return
        for entry in uncleaned:
            Journal.resume(entry).record(Phase.ABORTED, cleaned=True)

    def _stop_and_copy(self, departure: Switchover) -> None:
        self._log.record(Phase.STOP_AND_COPY)
        self._say(Phase.STOP_AND_COPY, f"freezing {self._wanted.id}")
        self._peer.call(protocol.PagesBegin())
        self._seeding.start_last_pass()
        self._clock.step("prepare")
        departure.gate.enter_context(syn_gate.closed(self._state, departure.spec))
        wait_settled(self._state, self._wanted.allow, PATIENCE)
        self._peer.limit(self._wanted.timeout)
        pages = departure.freeze(
            self._wanted.timeout,
            lambda: self._seeding.on_frozen(self._wanted.timeout),
            skip_in_flight="tcp-backlog" in self._wanted.allow,
        )
        self._frozen_at = departure.frozen_at
        self._clock.step("start criu", until=self._frozen_at)
        self._clock.step("dump")
        files_there = self._seeding.send_last_pass(self._left())
        self._peer.limit(self._left())
        self._peer.post(pages)
        count = departure.send_images(self._frozen_at + self._wanted.timeout)
        self._peer.answer(self._left())
        self._clock.step("images")
        if files_there is not None:
            files_there()
            self._clock.step("files")
        left = self._left()
        self._peer.post(protocol.Restore(count, left, self._seeding.roots()))
        self._peer.answer(left + ANSWER_GRACE)
        self._peer.limit()
        self._clock.step("restore")
        self._log.record(Phase.PREPARED, durable=False)

    def _left(self) -> float:
        """Seconds that the container may still be frozen. Raises DeadlineExceeded when there are none."""
        left = self._frozen_at + self._wanted.timeout - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"container {self._wanted.id} has been frozen for {self._wanted.timeout:g} s",
                remedy="--timeout SECONDS allows it more time",
            )
        return left

    def _hand_over(self, departure: Switchover, leaving: dict[str, list[str]]) -> None:
        """The source dies, then the target runs."""
        state = self._state
        try:
            moved_mark.note(state)
        except OSError as error:
            words = f"{state.bundle} cannot be marked ({error.strerror}): an engine may start {state.id} here again"
            self._monitor.emit(Warned(words))
        departure.kill_source(lambda: self._log.record(Phase.COMMITTED, durable=False, killed=True))
        self._clock.step("source ends")
        try:
            self._peer.call(protocol.Resume(), RESUME_TIMEOUT)
        except Error as error:
            self._monitor.emit(Warned(f"the target did not confirm: {error}; asking again over a new connection"))
            settle(self._log, self._wanted.id, self._wanted.host, str(self._store.root), self._migration)
        self._resumed_at = time.monotonic()
        self._clock.step("resume")
        marks.leave(leaving, Owner(state.id, state.created, self._store.root), self._migration)

    def _finish(self, dropped: int) -> Report:
        """The container runs at the target: journal it, clean up here, report."""
        if self._log.phase is not Phase.RESUMED:
            self._log.record(Phase.RESUMED)
        if dropped:
            words = f"{dropped} inotify or fanotify descriptor{'s' if dropped > 1 else ''} had events waiting"
            self._monitor.emit(Warned(f"{words} when {self._wanted.id} was frozen: they are lost, later ones are not"))
        self._say(Phase.RESUMED, f"{self._wanted.id} runs at {self._wanted.host}; cleaning up")
        leftover = clean_source(self._store, self._state, self._peer)
        self._clock.step("clean-up")
        report = Report(
            id=self._wanted.id,
            source=self._source,
            target=self._wanted.host,
            mode=str(self._wanted.mode),
            workload="TARGET",
            downtime_s=self._resumed_at - self._frozen_at,
            total_s=time.monotonic() - self._clock.started,
            bytes_sent=sum(item.bytes_sent for item in self._passes) + self._peer.bytes_sent,
            phases=self._clock.steps,
            passes=self._passes,
        )
        self._monitor.emit(report)
        if leftover is not None:
            raise MovedDirty(
                f"container {self._wanted.id} runs at {self._wanted.host}, but what is left here cannot go: {leftover}",
                cause=leftover, remedy=f"pymigrate delete --force {self._wanted.id}",
            )  # fmt: skip
        return report

    def _roll_back(self, criu_log: bytes, damage: str, error: BaseException) -> None:
        """The container already runs here again (its dump session is closed); clean the target and say so."""
        cleaned = clean_target(self._peer, self._wanted.host, str(self._store.root), self._migration)
        remedy = getattr(error, "remedy", None)
        notes = [remedy] if remedy else []
        try:
            self._log.record(Phase.ABORTED, reason=str(error), cleaned=cleaned)
        except MigrateError as unwritten:
            notes.append(str(unwritten))
        if saved := save_log(criu_log, self._migration):
            notes.append(f"CRIU's log: {saved}")
        if not cleaned:
            notes.append(f"{self._wanted.host} could not be cleaned: the next move to it does that")
        alive = criu_options.is_running(self._state)
        where = f"it runs here, at {self._source}, as before" if alive else f"it has ended here, at {self._source}"
        if alive and damage:
            where = f"it runs here, at {self._source}, but is damaged ({damage})"
        failed = RolledBack(
            f"container {self._state.id} was not moved, {where}: {error or type(error).__name__}",
            cause=error, remedy="\n".join(notes) or None,
        )  # fmt: skip
        if not alive:
            failed.workload = "NEITHER"
        raise failed from error

    def _on_pages(self, done: int) -> None:
        self._monitor.emit(Progress(Phase.STOP_AND_COPY, done))

    def _say(self, phase: Phase, text: str) -> None:
        self._monitor.emit(PhaseStarted(phase, text))


def _uncleaned(wanted: MigrationSpec, root: str, current: str) -> Iterator[Entry]:
    """Moves to this host that were aborted without its knowledge, or that ended with their coordinator.

    That a move of the same container is not going on any more is sure: we hold the container's lock.
    """
    for entry in journal.entries():
        if (entry.role, entry.target) != ("source", wanted.host) or entry.migration == current:
            continue
        untold = entry.phase is Phase.ABORTED and entry.fields.get("cleaned") is False
        same = (entry.id, entry.fields.get("root")) == (wanted.id, root)
        if untold or (same and workload(entry.phase) == "SOURCE" and entry.phase is not Phase.ABORTED):
            yield entry


def _hints(state: State, place: dict[str, Any]) -> list[str]:
    """Where the bundle lies on the hosts the container has been to, the newest last, without the place it goes to."""
    known = [*state.bundle_hints, state.bundle]
    return [path for path in dict.fromkeys(known) if path != place["bundle"]][-8:]
