"""The source's side of memory that travels while the container runs: choose the mode, send rounds, then the rest."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

from criu_rpc.errors import Error
from migrate import faults
from migrate.errors import DeadlineExceeded, MigrateError
from migrate.events import Reporter, RoundDone
from migrate.limits import PAGES_CLOSE_TIMEOUT, ROUND_TIMEOUT
from migrate.memory import convergence, forecast, layout, lazy_support, tracker
from migrate.memory.clean_pages import CleanPages
from migrate.memory.convergence import Round, Verdict
from migrate.memory.forecast import Load, Past
from migrate.memory.injector import Injector
from migrate.memory.layout import Range
from migrate.memory.precopy import PreCopy
from migrate.model import MigrationMode, MigrationSpec, OnDivergence
from migrate.phases import Phase
from migrate.source import history
from migrate.source.shared_memory import SharedMemory
from migrate.wire import codec, protocol, replies, streams
from migrate.wire.carrier import DEPTH, Carrier, Carriers
from migrate.wire.native import Buffer
from migrate.wire.peer import Peer
from migrate.wire.rate import Limit
from migrate.wire.streams import Stream
from runtime.freeze.throttle import Throttle
from runtime.spec.config import Spec
from runtime.state.record import State

_PROGRESS_INTERVAL = 0.1  # seconds


def require_possible(wanted: MigrationSpec) -> None:
    """Raise MigrateError if this host cannot send memory in the mode that the user has asked for."""
    problem = tracker.support() if wanted.mode is MigrationMode.PRE_COPY else ""
    if problem:
        raise MigrateError(f"--mode {wanted.mode}: {problem}", remedy="--mode auto or --mode stop-and-copy")


def choose(wanted: MigrationSpec, on_disk: str) -> tuple[MigrationMode, str]:
    """Return the mode of a move and the reason for it. `on_disk`: why the target cannot keep images in memory, or "".

    Raises MigrateError when the mode that the user has asked for is impossible.
    """
    if wanted.mode is not MigrationMode.AUTO and not on_disk:
        return wanted.mode, "as asked for"
    problem = tracker.support() or on_disk
    if problem and wanted.mode is MigrationMode.PRE_COPY:
        raise MigrateError(f"--mode {wanted.mode}: {wanted.host}: {problem}", remedy="--mode stop-and-copy")
    if problem:
        return MigrationMode.STOP_AND_COPY, problem
    return MigrationMode.PRE_COPY, f"writes are tracked by {tracker.name()}"


def may_be_lazy(wanted: MigrationSpec, init: int, spec: Spec) -> bool:
    """Return whether a container may be restored before its memory is in place, as far as this host knows."""
    if wanted.mode is MigrationMode.STOP_AND_COPY or "user" in spec.namespaces or tracker.support():
        return False
    return not lazy_support.shared_by_fork(init)


def lazy_problem(target: replies.MemoryReady, init: int, remapped: bool) -> str:
    """Return why the restore of a container has to wait until all memory is in place, "" if it need not.

    `remapped`: it has a user namespace.
    """
    if remapped and not target.remapped:
        return "it has a user namespace, and vm.unprivileged_userfaultfd is 0 at the target"
    return target.lazy_problem or lazy_support.shared_by_fork(init)


class MovingMemory:
    """The memory of one container on its way. A context manager: leaving it ends everything."""

    def __init__(
        self, peer: Peer, reporter: Reporter, state: State, wanted: MigrationSpec, size: int, injector: Injector,
        *, remapped: bool,
    ) -> None:  # fmt: skip
        """`size`: an estimate of the memory of all processes, in bytes; `remapped`: they have a user namespace.

        `injector` was started ahead, because that takes 50 ms; the caller closes it.
        """
        self._state, self._init, self._remapped = state, state.pid, remapped
        self.lazy_problem = ""
        self._peer, self._reporter, self._wanted, self._size = peer, reporter, wanted, size
        self._limit = Limit(wanted.bandwidth_limit) if wanted.bandwidth_limit is not None else None
        self._streams: list[Stream] = []
        self._carrier = Carriers(self._new_carrier(peer.send_memory))
        self._memory = PreCopy(state.pid, self._put, injector)
        self.shared = SharedMemory(state.pid, self._put)
        self.reported: list[RoundDone] = []
        self._done, self._total, self._shown = 0, 0, 0.0  # bytes of the present round; when they were reported
        self._rounds: list[Round] = []
        self._scale = forecast.Scale()
        self._rest = 0
        self._throttle: Throttle | None = None
        self._lock, self._is_last = threading.Lock(), False
        self._last = threading.Thread(target=self._send_frozen, name="last-pages", daemon=True)
        self._failure: Exception | None = None
        self.clean: CleanPages | None = None  # what CRIU need not pin; None: it pins every page

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unthrottle(last=True)
        self._carrier.close()
        streams.close_all(self._streams)
        if self._last.is_alive():
            self._last.join(PAGES_CLOSE_TIMEOUT)
        self._memory.__exit__(None, None, None)

    @property
    def compresses(self) -> bool:
        """Return whether memory is compressed on its way."""
        return self._carrier.compresses

    @property
    def carried_bytes(self) -> tuple[int, int]:
        """Return the bytes of memory so far, before and after compression."""
        return self._carrier.size, self._carrier.sent

    @property
    def bytes_sent(self) -> int:
        """Return the bytes that went over the streams beside the agent's connection."""
        return sum(stream.bytes_sent for stream in self._streams)

    def send_rounds(self) -> None:
        """Send memory in rounds, until the gap would be short enough, or does not get shorter.

        The container may be throttled afterwards: see `unthrottle`. Raises MigrateError for a program that writes too
        fast if the user wants that, and connection errors.
        """
        try:
            self._send_rounds()
            self.clean = CleanPages(self.send_last) if self._memory.clean else None
        except BaseException:
            self.unthrottle(last=True)
            raise

    def _send_rounds(self) -> None:
        begin = protocol.MemoryBegin(self._size, self._peer.digest, self._wanted.streams - 1)
        self._peer.post(begin)
        left = self._memory.scan()  # while the target makes its store
        target: replies.MemoryReady = self._peer.answer()
        self.lazy_problem = lazy_problem(target, self._init, self._remapped)
        if self._wanted.streams > 1:
            self._open_streams(target.stream)
        self._prepare_throttle()
        self._rest = self._memory.rest
        self._scale = forecast.scale(forecast.like(history.past(), self._wanted.host, self._load()))
        while True:
            with faults.point("round", len(self._rounds)):
                begun, sent_before, held_before = time.monotonic(), self._carrier.sent, self._carrier.held
                self._done, self._total = 0, left + self.shared.changed
                read = self._memory.send() + self.shared.send()
                self._total = 0
                self._carrier.flush(ROUND_TIMEOUT)
                self._peer.call(protocol.MemorySync(self._carrier.sizes), ROUND_TIMEOUT)
                seconds = time.monotonic() - begun
                left = self._memory.scan()
            if self._rounds:
                self._rest = self._memory.rest + self.shared.changed
            else:
                self._warn_of_untracked()
            self._rounds.append(Round(read, seconds, left, self._carrier.held - held_before))
            self._report(self._carrier.sent - sent_before)
            verdict = convergence.judge(
                self._rounds, fixed=self._fixed(), max_downtime=self._wanted.max_downtime,
                max_rounds=self._wanted.max_rounds,
            )  # fmt: skip
            if verdict is Verdict.SWITCH:
                return
            if verdict is Verdict.CONTINUE or (verdict is Verdict.DIVERGED and self._throttled_more()):
                continue
            self._diverged(verdict)
            return

    def _new_carrier(self, send: Callable[[tuple[Buffer, ...]], None]) -> Carrier:
        wanted, peer = self._wanted, self._peer
        return Carrier(
            send, digest=peer.digest, compress=codec.settle(wanted.compress, peer.offers, wanted.host),
            limit=self._limit, depth=max(2, DEPTH // wanted.streams),
        )  # fmt: skip

    def _open_streams(self, command: list[str]) -> None:
        """Open the connections beside the first, with the target's command. Raises HostError, TargetError."""
        wanted = self._wanted
        self._streams = streams.open_all(wanted.host, wanted.streams - 1, command)
        self._peer.call(protocol.MemoryStreams())
        for stream in self._streams:
            self._carrier.add(self._new_carrier(stream.send))

    def _prepare_throttle(self) -> None:
        if self._wanted.on_divergence is OnDivergence.THROTTLE:
            try:
                self._throttle = Throttle(self._state)
            except Error as error:
                self._reporter.warn(f"{self._wanted.id} cannot be throttled: {error}")

    def _throttled_more(self) -> bool:
        """Give the container less processor time, and return whether that was possible, and rounds are left."""
        if self._throttle is None or len(self._rounds) >= self._wanted.max_rounds:
            return False
        try:
            if not self._throttle.tighten():
                return False
        except Error as error:
            self._reporter.warn(f"{self._wanted.id} cannot be throttled: {error}")
            self.unthrottle(last=True)
            return False
        self._reporter.throttled(self._throttle.percent)
        return True

    def unthrottle(self, *, last: bool = False) -> None:
        """Give the container its own limit of processor time again. `last`: it will not be throttled any more."""
        if self._throttle is None:
            return
        try:
            if last:
                throttle, self._throttle = self._throttle, None
                throttle.close()
            else:
                self._throttle.lift()
        except (Error, OSError) as error:
            remedy = f"`pymigrate resume {self._wanted.id}` or the next move tries again"
            self._reporter.warn(f"{self._wanted.id} is still throttled: {error}; {remedy}")

    def _warn_of_untracked(self) -> None:
        if found := self._memory.untracked:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            self._reporter.warn(f"writes of {found[0]}{more} cannot be tracked: its memory is sent in the freeze")

    def _put(self, body: bytes) -> None:
        """Send a body, and report progress in a round."""
        if self._streams and layout.drops(body):
            return  # over several connections it could come after memory of the next program with this pid
        self._carrier.put(body)
        if self._total:
            self._done += layout.covered(body)
            if time.monotonic() - self._shown >= _PROGRESS_INTERVAL:
                self._shown = time.monotonic()
                self._reporter.progress(Phase.PRE_COPY, self._done, self._total)

    def _load(self) -> Load:
        waits = bool(self.lazy_problem)
        return Load(self._size, self._memory.processes, self._peer.round_trip, waits, self.shared.size)

    def _fixed(self) -> float:
        """Return the seconds of the gap that another round does not shorten."""
        return self._load().fixed() * self._scale.middle + self._rest / convergence.frozen_bandwidth(self._rounds)

    def measured(self, gap: float, total: float) -> Past:
        """Return what the next prediction can learn: this move had a gap, and took `total` seconds until its end."""
        rounds = sum(one.seconds for one in self._rounds)
        sending = (self._rounds[-1].left + self._rest) / convergence.frozen_bandwidth(self._rounds)
        expected = self.reported[-1].expected_gap
        return Past(
            self._wanted.host, self._load(), max(0.0, gap - sending), max(0.0, total - rounds - gap), expected, gap
        )

    def _report(self, sent: int) -> None:
        last = self._rounds[-1]
        done = self._reporter.round_done(
            len(self._rounds), bytes_read=last.read, bytes_sent=sent, seconds=last.seconds, left=last.left,
            dirty_rate=last.dirty_rate, bandwidth=convergence.bandwidth(self._rounds),
            expected_gap=convergence.expected_gap(self._rounds, self._fixed()),
        )  # fmt: skip
        self.reported.append(done)

    def _diverged(self, verdict: Verdict) -> None:
        """Say that the gap will be too long. Raises MigrateError if the user does not want it then."""
        gap = convergence.expected_gap(self._rounds, self._fixed())
        rate = self._rounds[-1].dirty_rate / (1 << 20)
        why = f"writes {rate:.0f} MiB/s of its memory" if verdict is Verdict.DIVERGED else "takes long to be restored"
        words = (
            f"{self._wanted.id} {why}: "
            f"the gap will be about {gap:.1f} s, more than --max-downtime {self._wanted.max_downtime:g}"
        )
        if self._wanted.on_divergence is OnDivergence.ABORT:
            raise MigrateError(words, remedy="allow a longer --max-downtime, or --on-divergence switch-over")
        self._reporter.warn(words)

    def send_last(self) -> None:
        """The container is frozen: send what it has written since the last round, on a thread of its own.

        The bandwidth limit does not hold for it. Only the first call does anything.
        """
        with self._lock:
            if not self._is_last:
                self._is_last = True
                self._carrier.lift_limit()
                self._last.start()

    def _send_frozen(self) -> None:
        try:
            with faults.point("last-pages"):
                self._memory.scan_frozen()
                if self.clean is not None:
                    self.clean.know(self._memory.clean)
                self._memory.send()
        except (Error, OSError) as error:
            self._failure = error
        finally:
            if self.clean is not None:
                self.clean.know({})

    def complete(self, lazy: Mapping[int, list[Range]], timeout: float) -> protocol.MemoryEnd:
        """Send what CRIU lists in `lazy` and the target lacks, within `timeout` seconds. Return the end of the stream.

        Raises DeadlineExceeded and connection errors.
        """
        deadline = time.monotonic() + timeout
        self._last.join(timeout)
        if self._last.is_alive():
            raise DeadlineExceeded("the last pages of memory were not sent in time")
        if self._failure is not None:
            raise self._failure
        self._memory.complete(lazy)
        self._carrier.flush(max(0.0, deadline - time.monotonic()))
        shared = {str(image): space for image, space in self.shared.images.items()}
        return protocol.MemoryEnd(tuple(protocol.Sent(*sent) for sent in self._carrier.digests()), shared)
