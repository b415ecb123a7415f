"""Predict how a move would go, and change nothing at either end: `pymigrate move --plan`.

The same checks as before a move; then two seconds of tracking show how fast the program writes its memory, and a trial
shows how fast memory is sent. The rounds that would follow are simulated (memory/forecast.py).
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from migrate.events import Monitor, Planned
from migrate.files import fingerprint
from migrate.limits import CONTAINER_LOCK_TIMEOUT, TRIAL_TIMEOUT
from migrate.memory import advice, forecast, layout
from migrate.memory.convergence import Verdict
from migrate.memory.forecast import Aim, Load, Written
from migrate.memory.injector import Injector
from migrate.memory.precopy import PreCopy
from migrate.model import MigrationMode, MigrationSpec
from migrate.phases import Phase
from migrate.preflight import processes as process_scan
from migrate.source import history
from migrate.source.memory import choose, lazy_problem
from migrate.source.ready import Checked, Preflight
from migrate.source.shared_memory import SharedMemory
from migrate.wire import codec, protocol, replies
from migrate.wire.carrier import Carrier
from runtime.linux import processes
from runtime.state.store import Store

_LOOKS = (0.25, 0.5, 1.0, 2.0)  # seconds after which it is looked what was written
_TRIAL_SECONDS, _TRIAL_BYTES = 1.0, 64 << 20  # of memory that are sent at most
_SAMPLE_BYTES = 16 << 20  # of shared memory that is kept to be sent then
_PINGS = 3
_OVERHEAD = 0.5  # seconds of a move before its rounds and after its gap, without earlier moves to tell


def plan(store: Store, wanted: MigrationSpec, monitor: Monitor) -> Planned:
    """Emit and return what a move would be like. Raises Blocked and connection errors, as a move does at its start."""
    preflight = Preflight(store, wanted, monitor, "")
    with (
        preflight.reporter.naming_errors(),
        store.lock(wanted.id, CONTAINER_LOCK_TIMEOUT),
        preflight.check() as checked,
    ):
        mode, reason = choose(wanted, "")
        preflight.reporter.phase(Phase.PREFLIGHT, f"measuring {wanted.id} and the connection to {wanted.host}")
        measured = _Measured(checked, track=mode is not MigrationMode.STOP_AND_COPY)
    planned = _predict(checked, measured, mode, reason)
    preflight.reporter.emit(planned)
    return planned


class _Measured:
    """The container and the connection, measured.

    `written` is None if writes are not tracked. `rest` and `shared` are in bytes, `bandwidth` in bytes of memory per
    second.
    """

    def __init__(self, checked: Checked, *, track: bool) -> None:
        """Raises connection errors."""
        state, peer = checked.state, checked.peer
        self.memory = process_scan.memory_bytes(state.pid)
        self.written: Written | None = None
        self.rest = self.memory
        self.untracked: list[str] = []
        self.shared = 0
        if not track:
            self.processes = len(processes.container_pids(state.pid))
            self.target, self.bandwidth = _trial(checked, _random())
        else:
            with Injector() as injector, PreCopy(state.pid, lambda _: None, injector) as memory:
                total = memory.scan()
                sample = _Sample()
                shared = SharedMemory(state.pid, sample.add)
                sample.step = max(1, shared.size // _SAMPLE_BYTES)
                self.shared = shared.send()
                known = itertools.chain(memory.sample(_TRIAL_BYTES), sample.take())
                self.target, self.bandwidth = _trial(checked, known if total + self.shared else _random())
                self.written = _look(memory, total)
                self.rest = memory.rest + shared.send()
                self.processes, self.untracked = memory.processes, memory.untracked
        self.round_trip = peer.round_trip
        self.lazy_problem = lazy_problem(self.target, state.pid, "user" in checked.spec.namespaces)


class _Sample:
    """Keeps one in `step` bodies of shared memory, for a trial of the connection."""

    def __init__(self) -> None:
        self.step = 1
        self._come, self._bodies = 0, list[bytes]()

    def add(self, body: bytes) -> None:
        if self._come % self.step == 0 and len(self._bodies) * layout.BLOCK < _SAMPLE_BYTES:
            self._bodies.append(body)
        self._come += 1

    def take(self) -> list[bytes]:
        """Return what was kept, which is kept no longer."""
        bodies, self._bodies = self._bodies, []
        return bodies


def _look(memory: PreCopy, total: int) -> Written:
    """Look for two seconds what is written of `total` bytes of memory."""
    memory.skip()
    memory.scan()  # what was written during the trial
    memory.skip()
    begun, points = time.monotonic(), []
    for at in _LOOKS:
        time.sleep(max(0.0, begun + at - time.monotonic()))
        points.append((time.monotonic() - begun, memory.scan()))
    return Written(tuple(points), max(total, points[-1][1]))


def _random() -> Iterator[bytes]:
    """Yield bodies of memory that has no zeros and cannot be compressed."""
    size = layout.BLOCK
    for number in range(_TRIAL_BYTES // size):
        head = layout.head(1, [layout.word(number * size, size // layout.PAGE)])
        yield head + os.urandom(size)


def _trial(checked: Checked, bodies: Iterator[bytes]) -> tuple[replies.MemoryReady, float]:
    """Send memory that the target throws away. Return what it says of itself, and the bandwidth."""
    peer, wanted = checked.peer, checked.wanted
    target = peer.call(protocol.TrialBegin())
    compress = codec.settle(wanted.compress, peer.offers, wanted.host)
    carrier = Carrier(peer.send_memory, digest=peer.digest, compress=compress)
    try:
        begun, size = time.monotonic(), 0
        for body in bodies:
            carrier.put(body)
            size += layout.covered(body)
            if time.monotonic() - begun > _TRIAL_SECONDS:
                break
        carrier.flush(TRIAL_TIMEOUT)
        peer.call(protocol.MemorySync(), TRIAL_TIMEOUT)
        seconds = time.monotonic() - begun
        for _ in range(_PINGS):
            peer.call(protocol.MemorySync())
        peer.call(protocol.TrialEnd(carrier.size))
    finally:
        carrier.close()
    return target, size / max(seconds, 1e-6)


def _predict(checked: Checked, measured: _Measured, mode: MigrationMode, reason: str) -> Planned:
    """Return how the move would go, by what was measured and by what earlier moves have taken."""
    wanted, written = checked.wanted, measured.written
    load = Load(
        measured.memory, measured.processes, measured.round_trip, written is not None and bool(measured.lazy_problem),
        measured.shared,
    )  # fmt: skip
    past = forecast.like(history.past(), wanted.host, load)
    aim = Aim(wanted.max_downtime, wanted.max_rounds, wanted.bandwidth_limit or math.inf)
    scale, doubt = forecast.scale(past), 1 + forecast.DOUBT
    run, low, high = (
        forecast.simulate(load, written, measured.rest, measured.bandwidth, aim, scaled, doubted)
        for scaled, doubted in ((scale.middle, 1.0), (scale.low, 1 / doubt), (scale.high, doubt))
    )
    overhead = statistics.median([move.overhead for move in past] or [_OVERHEAD])
    rate = written.rate if written is not None else 0.0
    return Planned(
        id=wanted.id,
        migration="",
        target=wanted.host,
        mode=str(mode),
        reason=reason,
        gap_s=run.gap,
        gap_low_s=min(low.gap, run.gap),
        gap_high_s=max(high.gap, run.gap),
        total_s=overhead + run.seconds,
        bytes=run.size + measured.rest,
        files=fingerprint.size(Path(checked.state.rootfs)) + sum(tree.size for tree in checked.plan.trees),
        rounds=len(run.rounds),
        converges=run.verdict is not Verdict.DIVERGED,
        memory=measured.memory,
        processes=measured.processes,
        written=written.points if written is not None else (),
        dirty_rate=rate,
        bandwidth=measured.bandwidth,
        round_trip_s=measured.round_trip,
        earlier_moves=len(past),
        parts=run.parts,
        dominant=advice.dominant(run),
        advice=advice.advice(
            run, load, rate=rate, bandwidth=min(measured.bandwidth, aim.limit),
            reason=measured.lazy_problem if written is not None else reason,
        ),
        unmeasured=tuple(measured.untracked),
    )  # fmt: skip
