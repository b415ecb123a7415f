"""Preflight: everything that is checked before a move touches anything."""

import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from migrate import faults
from migrate.errors import MigrateError
from migrate.events import Monitor, Reporter
from migrate.files.fingerprint import fingerprint
from migrate.journal.journal import Journal
from migrate.journal.undecided import frozen_tree, undecided
from migrate.limits import PASSING_PATIENCE
from migrate.model import MigrationSpec
from migrate.phases import Phase
from migrate.preflight import landlock, volumes
from migrate.preflight.container import container_blockers
from migrate.preflight.hostfacts import gather
from migrate.preflight.rules import Blocker
from migrate.preflight.target import preflight
from migrate.preflight.volumes import Plan
from migrate.source import memory
from migrate.source.clock import Clock
from migrate.source.early import Early
from migrate.wire import codec
from migrate.wire.ahead import Ahead
from migrate.wire.peer import Peer, Session, connect
from migrate.wire.questions import FactsQuery, HostFacts
from runtime.freeze import mend
from runtime.spec import config as spec_config
from runtime.spec.config import Spec
from runtime.state.kept_config import load_kept
from runtime.state.record import State
from runtime.state.store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """A move that nothing blocks, with the target connected. Nothing is changed yet.

    `spec` is the container's config as the target gets it; `plan` says what happens to its mounts; `digest` is the
    fingerprint of its root file system, "" if that may change. A context manager: leaving it ends the connection.
    """

    store: Store
    wanted: MigrationSpec
    reporter: Reporter
    clock: Clock
    state: State
    spec: Spec
    plan: Plan
    digest: str
    peer: Peer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()


@dataclass(frozen=True)
class Ready(Checked):
    """A move that may begin: its journal says PREFLIGHT."""

    log: Journal
    early: Early

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.early.close()


class Preflight:
    """The checks of one move of one container to one host. The caller holds the container's lock.

    `session`: where to take the connection from, if one is made for several moves, or ahead of this one.
    """

    def __init__(
        self,
        store: Store,
        wanted: MigrationSpec,
        monitor: Monitor,
        migration: str,
        session: Session | Ahead | None = None,
    ) -> None:
        self._store, self._wanted, self._clock, self._session = store, wanted, Clock(), session
        self._migration = migration
        self.reporter = Reporter(monitor, wanted.id, migration)

    def run(self) -> Ready:
        """Check everything, and begin the journal of the move. Raises Blocked and connection errors."""
        with contextlib.ExitStack() as failing:

            def start(state: State, spec: Spec) -> Early:
                return failing.enter_context(Early(state, spec, self._wanted.mode))

            checked, early = self._check(mend.repair_left, start)
            failing.enter_context(checked)
            log = Journal.begin(
                self._migration, role="source", id=self._wanted.id, source=socket.gethostname(),
                target=self._wanted.host, root=str(self._store.root), created=checked.state.created,
                **frozen_tree(checked.state),
            )  # fmt: skip
            failing.pop_all()
        return Ready(**vars(checked), log=log, early=early)

    def check(self) -> Checked:
        """Check everything, and change nothing. Raises Blocked and connection errors."""
        return self._check(_require_whole, lambda _state, _spec: None)[0]

    def _check(self, prepare: Callable[[State], object], start: Callable[[State, Spec], T]) -> tuple[Checked, T]:
        """Check everything. `start` is called before the target is asked; what it returns is returned, too."""
        wanted, store = self._wanted, self._store
        state = store.load(wanted.id)
        self._require_decided(state)
        prepare(state)
        spec = load_kept(state)
        self.reporter.phase(Phase.PREFLIGHT, f"checking {wanted.id} and {wanted.host}")
        plan = volumes.plan(state, spec, wanted.volumes)
        memory.require_possible(wanted)
        started = start(state, spec)
        with ThreadPoolExecutor(1, "facts") as beside:  # asking CRIU takes as long as the log-in
            source = beside.submit(gather, FactsQuery())
            digest = beside.submit(fingerprint, Path(state.rootfs)) if spec.readonly else None
            blockers = container_blockers(state, spec, tcp_close=wanted.tcp_close, patience=PASSING_PATIENCE)
            peer = self._session.peer(store.root) if self._session else connect(wanted.host, root=store.root)
            try:
                checked = self._check_target(
                    peer, state, spec, plan, blockers, source.result(), digest.result() if digest is not None else ""
                )
                return checked, started
            except BaseException:
                peer.close()
                raise

    def _require_decided(self, state: State) -> None:
        entry = undecided(self._store, state.id, state.created)
        if entry is not None:
            raise MigrateError(
                f"container {state.id}: an earlier move of it, to {entry.target}, is undecided",
                remedy=f"pymigrate recover {state.id}",
            )

    def _check_target(
        self, peer: Peer, state: State, spec: Spec, plan: Plan, blockers: list[Blocker], source: HostFacts, digest: str
    ) -> Checked:
        """Raise Blocked with everything that blocks the move."""
        wanted, store = self._wanted, self._store
        spec = plan.spec(spec_config.elsewhere(spec, wanted.net))
        with faults.point("check-target"):
            plan = preflight(peer, store, state, spec, wanted.allow, blockers, plan, source)
        codec.settle(wanted.compress, peer.offers, wanted.host)  # or refuse, before anything is sent
        if words := landlock.warning(wanted.id, landlock.suspects(state.pid, spec)):
            self.reporter.warn(words)
        self._clock.step("preflight")
        return Checked(store, wanted, self.reporter, self._clock, state, spec, plan, digest, peer)


def _require_whole(state: State) -> None:
    """Raise MigrateError if there is something that `mend.repair_left` would change."""
    if mend.is_left(state):
        raise MigrateError(
            f"container {state.id}: an earlier dump of it was cut short", remedy=f"pymigrate recover {state.id}"
        )
