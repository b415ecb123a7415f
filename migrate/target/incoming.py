"""The target's half of a move: what each call does on this host, and how all of it is undone.

Images go where target/image_places.py says; files go to places that are new, or that a mark says are this container's
(target/files.py).

Until `resume`, whatever goes wrong ends in `abort`: the restored tree is killed before it has run an instruction,
and container and images are removed; so are files that are new, unless they are worth keeping for the next attempt. The
one exception: once PREPARED, a lost connection leaves the images (the source may be dead already, by decision), until
`settle` brings the verdict. To have the container run, `settle` removes nothing before it runs, whatever fails.
"""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Self

from criu_rpc.client import Criu
from criu_rpc.errors import Error
from migrate.disk import write_atomically
from migrate.errors import DeadlineExceeded, ProtocolError, TargetError
from migrate.files import receivers
from migrate.files.tmpfs import Mounted, Root
from migrate.files.trees import Needed, Owner, Tree, checked_list
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.model import FREEZE_TIMEOUT
from migrate.phases import FINAL, NEXT, Phase, workload
from migrate.target import image_cleanup, places, tmpfs_archive
from migrate.target import tmpfs as target_tmpfs
from migrate.target import trees as tree_store
from migrate.target.files import Arriving
from migrate.target.images import ReceivedImages, ReceivedPages
from migrate.wire.protocol import CheckTrees, OpenBundle, Prepare, Restore
from runtime.checkpoint.restore import Restoring
from runtime.checkpoint.restore_criu import RestorePlan
from runtime.linux import processes
from runtime.spec import config as spec_config
from runtime.state.record import State, check_id
from runtime.state.store import Store

RESTORE_TIMEOUT = 120.0
OLD_AGENT_TIMEOUT = 20.0
SETTLE_LOCK_TIMEOUT = 60.0  # for another one that settles the same move
SEED_SILENCE = 6 * 3600.0
FROZEN_SILENCE = 30.0  # beyond the limit for the freeze: the source has to end the container, too


class Incoming:
    """One move into this host. Calls come in the protocol's order; a call out of order is a ProtocolError."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._id = self._migration = self._source = ""
        self._files: Arriving | None = None
        self._journal: Journal | None = None
        self._images: ReceivedImages | None = None
        self._pages: ReceivedPages | None = None
        self._restoring: Restoring | None = None
        self._tmpfs: dict[str, str] = {}  # place in the container -> path here
        self._limits: dict[str, str] = {}  # of those, by path
        self._resumed = False
        self._untidy = False  # it runs here, and what brought it has not been removed yet
        self._settling = False
        self._timeout = FREEZE_TIMEOUT

    @classmethod
    def begin(cls, root: str) -> Self:
        """`root` is the directory of container states that the source's user chose."""
        path = Path(root)
        if not path.is_absolute() or ".." in path.parts or "\0" in root:
            raise ProtocolError(f"{root!r} is no state directory")
        return cls(Store(path))

    @property
    def idle_timeout(self) -> float:
        """Seconds that the source may be silent: long while rsync runs beside us, short once it is about to freeze."""
        seeding = self._journal is None or self._journal.phase in (Phase.PREFLIGHT, Phase.SEED)
        return SEED_SILENCE if seeding else self._timeout + FROZEN_SILENCE

    @property
    def activity(self) -> int:
        """A number that changes as long as something is done to receive files."""
        return receivers.activity(self._migration) if self._migration else 0

    def check_trees(self, call: CheckTrees) -> dict[str, Any]:
        """What speaks against the trees that are to come; see treestore.check."""
        trees, needed = checked_list(Tree, call.trees), checked_list(Needed, call.needed)
        return tree_store.check(trees, needed, self._owner_of(call.id, call.created), call.reserved)

    def open_bundle(self, call: OpenBundle) -> dict[str, Any]:
        """Find the bundle at a hint, or make a place for it, and for the trees that come along.

        Answers {"bundle", "rootfs", "complete", "trees": [complete, of each], "renewed": [of the rootfs, of each: does
        something older lie there], "notes": [what was left alone, in words]}.
        """
        if self._journal is not None:
            raise ProtocolError("OpenBundle came twice")
        if journal.load(call.migration) is not None:
            raise ProtocolError(f"migration {call.migration} is known here already")
        owner = self._owner_of(call.id, call.created)
        self._close_older(owner)
        self._files, answer = Arriving.plan(call, owner)
        self._id, self._migration, self._source = call.id, call.migration, call.source
        self._journal = Journal.begin(
            call.migration,
            role="target",
            id=self._id,
            source=call.source,
            target=os.uname().nodename,
            root=str(self._store.root),
            agent={"pid": os.getpid(), "start_time": processes.start_time(os.getpid())},
            created=call.created,
            **self._files.fields,
        )
        self._files.make()
        receivers.allow(self._migration)
        return answer

    def _close_older(self, owner: Owner) -> None:
        """The container comes from where it runs now: of what an earlier move of it has left here nothing may run."""
        for entry in list(journal.entries()):
            if entry.role == "target" and entry.phase not in FINAL and places.owner_of(entry) == owner:
                other = type(self).begin(owner.root)
                other.settle(entry.migration, "abort")
                other.tidy()

    def _owner_of(self, container_id: str, created: str) -> Owner:
        return Owner(check_id(container_id), created, str(self._store.root))

    def trees_sent(self) -> dict[str, Any]:
        """Check what must not have changed, and wait until the disks have what has come so far."""
        if self._files is None:
            raise ProtocolError("trees were sent before places for them were asked for")
        self._files.trees_sent()
        return {}

    def bundle_sent(self, expected: str) -> dict[str, Any]:
        """Check what rsync has brought."""
        if self._files is None:
            raise ProtocolError("a bundle was sent before one was opened")
        self._files.bundle_sent(expected)
        return {}

    def prepare(self, call: Prepare) -> dict[str, Any]:
        """Make everything around the container: directories, network namespace, cgroup, monitor, waiting CRIU."""
        if self._files is None or self._journal is None or self._restoring is not None:
            raise ProtocolError("Prepare came out of order")
        # Without rsync they stay with CRIU.
        mounted = [Mounted.from_json(value) for value in call.tmpfs] if shutil.which("rsync") else []
        self._tmpfs = places = target_tmpfs.places(self._migration, mounted)
        plan = {
            "stdio": call.stdio, "state": call.state, "tcp_close": call.tcp_close, "timeout": call.timeout,
            "tmpfs": places,
        }  # fmt: skip
        self._journal.record(Phase.SEED, plan=plan)
        self._timeout = call.timeout
        image_cleanup.sweep()
        self._images = ReceivedImages.make(self._migration, call.memory)
        self._limits = target_tmpfs.make(self._migration, mounted)
        self._restoring = self._begin_restore(self._files.bundle, plan)
        self._images.await_keeper()
        return {"tmpfs": places, "cgroup": self._restoring.memory_cgroup, "on_disk": self._images.reason}

    def pages_begin(self) -> dict[str, Any]:
        if self._images is None or self._pages is not None or self._journal is None:
            raise ProtocolError("PagesBegin came out of order")
        self._journal.record(Phase.STOP_AND_COPY)
        self._pages = ReceivedPages.start(self._images.path, self._timeout)
        return {}

    def pages(self, payload: bytes) -> None:
        """A piece of the page stream, on to the page server. A dead server shows at PagesEnd."""
        if self._pages is None:
            raise ProtocolError("pages came before PagesBegin")
        self._pages.feed(payload)

    def pages_end(self, size: int, digest: str) -> dict[str, Any]:
        """The page server has written everything when this answers."""
        if self._pages is None:
            raise ProtocolError("PagesEnd came before PagesBegin")
        pages, self._pages = self._pages, None
        pages.finish(size, digest)
        return {}

    def image(self, name: str, size: int, digest: str) -> None:
        if self._images is None:
            raise ProtocolError("an image came before Prepare")
        self._images.begin(name, size, digest)

    def data(self, payload: bytes) -> None:
        if self._images is None:
            raise ProtocolError("data came before Prepare")
        self._images.write(payload)

    def restore(self, call: Restore) -> dict[str, Any]:
        """Restore and hold, in the time of the call; answers {"pid"}: the container's init here, which has not run."""
        if self._images is None or self._restoring is None or self._journal is None or self._pages is not None:
            raise ProtocolError("Restore came out of order")
        receivers.forbid(self._migration)  # the source has seen all of them end
        self._images.check(call.count)
        if call.roots.keys() != self._tmpfs.keys():
            raise ProtocolError("Restore is about other tmpfs mounts than Prepare was")
        for place, root in call.roots.items():
            Root.from_json(root).give(self._tmpfs[place])
        target_tmpfs.narrow(self._limits)
        pid = self._restoring.restore(call.timeout)
        self._images.hold()
        self._journal.record(Phase.PREPARED, durable=False)
        return {"pid": pid}

    def confirm(self) -> dict[str, Any]:
        """Answer that the restored tree is still held. Raises CriuError, ContainerError when it is not."""
        if self._restoring is None or self._journal is None or self._journal.phase is not Phase.PREPARED:
            raise ProtocolError("Confirm came out of order")
        self._restoring.require_held()
        return {}

    def resume(self) -> dict[str, Any]:
        """The container runs from here on, whatever else happens."""
        if self._restoring is None or self._journal is None or self._journal.phase is not Phase.PREPARED:
            raise ProtocolError("Resume came out of order")
        if self._images is not None:
            self._images.decided()
        return {"pid": self._confirm(self._restoring.resume()).pid}

    def history(self, log: str) -> dict[str, Any]:
        """Keep what the container had written before it came here."""
        if not self._resumed or self._restoring is None or self._files is None:
            raise ProtocolError("History came before Resume")
        write_atomically(Path(self._restoring.history_path), log.encode())
        self._files.flush()
        self._files.note_use()
        return {}

    def abort(self) -> dict[str, Any]:
        """Undo everything. Harmless when there is nothing to undo.

        Refused once the container runs here, or the source has ended it.
        """
        if self._resumed:
            raise ProtocolError("the container already runs here")
        if self._settling:
            raise ProtocolError("the source has ended the container: what is here of it stays")
        self._undo()
        if self._journal is not None and self._journal.phase is not Phase.ABORTED:
            self._journal.record(Phase.ABORTED)
        return {}

    def connection_lost(self) -> None:
        """The source is gone: undo, but keep the images if the source may have given the container up."""
        if self._resumed:
            self.tidy()
            return
        with contextlib.suppress(Error, OSError):
            if self._settling or (self._journal is not None and self._journal.phase is Phase.PREPARED):
                self._stop()
                if self._images is not None:
                    self._images.leave()
            elif self._journal is None or self._journal.phase is not Phase.ABORTED:
                self.abort()

    def settle(self, migration: str, verdict: str) -> dict[str, Any]:
        """End a move whose connection was lost, or say how it has ended; see protocol.Settle.

        Raises TargetError when nothing is known here of the move, or its container cannot be restored at present: what
        is here of it stays.
        """
        entry = _known(migration)
        if entry is None and verdict == "abort":
            return _verdict("SOURCE")
        if entry is None:
            raise TargetError(
                f"nothing is known here of migration {migration}",
                remedy="is this the host that it went to, and is its /var/lib/pymigrate mounted?",
            )
        if verdict == "ask":
            return _verdict(workload(entry.phase, "target"))
        if entry.phase is not Phase.RESUMED:
            _end_old_agent(entry.fields.get("agent", {}))
        with self._store.lock(check_id(entry.id), SETTLE_LOCK_TIMEOUT):
            entry = _known(migration) or entry
            if entry.phase is Phase.RESUMED:  # whatever has become of it since
                return _verdict("TARGET", since=entry.updated)
            if entry.phase is Phase.ABORTED:  # undone already; what lies in its places by now is not its own
                reason = f"migration {migration} was undone here at {entry.updated}, and its images were removed"
                return _verdict("SOURCE") if verdict == "abort" else _verdict("NEITHER", reason=reason)
            self._take_over(entry)
            state = Restoring.left_behind(self._store, entry.id, migration, OLD_AGENT_TIMEOUT)
            if state is not None:
                self._confirm(state)
                return _verdict("TARGET", since=entry.updated)
            if verdict == "abort":
                self.abort()
                return _verdict("SOURCE")
            return self._restore_again(entry)

    def _take_over(self, entry: Entry) -> None:
        """Go on with a move that another agent has begun."""
        receivers.end(entry.migration)
        self._id, self._migration, self._journal = check_id(entry.id), entry.migration, Journal.resume(entry)
        self._source = entry.source
        self._files = Arriving.resume(entry, self._owner_of(entry.id, str(entry.fields.get("created", ""))))
        self._images = ReceivedImages.existing(entry.migration)

    def _restore_again(self, entry: Entry) -> dict[str, Any]:
        """The source has ended the container: restore it from the images, if they are whole, and have it run.

        Nothing is removed before it runs. The images' digests count, not the phase: the line of PREPARED may be lost.
        """
        assert self._files is not None
        assert self._journal is not None
        self._settling = True
        plan = entry.fields.get("plan", {})
        try:
            if self._images is None:
                raise TargetError(f"there are no whole images of migration {entry.migration} here")
            self._images.verify()
        except TargetError as damage:
            return _verdict("NEITHER", reason=str(damage))
        tmpfs_archive.unpack(entry.migration, self._images.path)
        try:
            target_tmpfs.check(plan.get("tmpfs", {}).values())
        except TargetError as lost:
            return _verdict("NEITHER", reason=str(lost))
        if not self._images.has_manifest and entry.phase is not Phase.PREPARED:
            raise TargetError(f"{self._images.path}: nothing says whether these images are complete ({entry.phase})")
        if entry.id in self._store.ids():
            raise TargetError(
                f"another container here has the id {entry.id}",
                remedy=f"move or delete that one, then run `pymigrate recover {entry.id}` again",
            )
        try:
            self._restoring = self._begin_restore(self._files.bundle, plan)
            self._restoring.restore(max(RESTORE_TIMEOUT, plan.get("timeout", 0.0)))  # nothing runs: no reason for haste
            if self._journal.phase is not Phase.PREPARED:
                self._journal.record(Phase.PREPARED)
            self.resume()
        except BaseException:
            if not self._resumed:
                self._stop()
            raise
        self._files.flush()
        self._files.note_use()
        return _verdict("TARGET")

    def discard(self, migrations: list[str]) -> dict[str, Any]:
        """Remove what is left of moves that their source has aborted while this host was dead or cut off."""
        for migration in migrations:
            entry = journal.load(migration)
            if entry is not None and entry.role == "target" and entry.phase not in FINAL:
                other = type(self).begin(entry.fields["root"])
                other.settle(migration, "abort")
                other.tidy()
        return {}

    def _confirm(self, state: State) -> State:
        """The container was let run: say so in the journal; the images are of no use any more (`tidy`)."""
        assert self._journal is not None
        self._resumed = self._untidy = True
        for phase in (Phase.PREPARED, Phase.COMMITTED):  # the line of the first may be lost
            if phase in NEXT[self._journal.phase] and phase is not self._journal.phase:
                self._journal.record(phase, durable=False)
        self._journal.record(Phase.RESUMED)
        if self._files is not None:
            self._files.confirm()
        return state

    def tidy(self) -> None:
        """Remove what is of no use once the container runs: the source has been told before, and need not wait."""
        if self._untidy:
            self._untidy = False
            with contextlib.suppress(Error, OSError):  # `migrations --clean` does it
                if self._images is not None:
                    self._images.remove()
                ReceivedImages.remove_left(self._migration)
                target_tmpfs.remove(self._migration)

    def _begin_restore(self, bundle: Path, fields: dict[str, Any]) -> Restoring:
        assert self._images is not None
        carried = dict(fields["state"])
        annotations = {str(key): str(value) for key, value in dict(carried.get("annotations", {})).items()}
        loaded = spec_config.load(bundle, annotations)
        plan = RestorePlan(
            id=self._id,
            bundle=str(bundle),
            images=str(self._images.path),
            work=str(self._images.path),
            stdio=tuple(fields["stdio"]),
            carried=carried,
            move=self._migration,
            source=self._source,
            options={"tcp_close": True} if fields.get("tcp_close") else {},
            mounted=fields.get("tmpfs", {}),
        )
        return Restoring.prepare(self._store, loaded, plan, Criu())

    def _stop(self) -> None:
        """End every process that this move started here; files stay."""
        try:
            if self._migration:
                receivers.end(self._migration)
        finally:
            if self._pages is not None:
                self._pages.kill()
                self._pages = None
            if self._restoring is not None:
                self._restoring.abort()
                self._restoring = None

    def _undo(self) -> None:
        self._stop()
        if self._images is not None:
            self._images.remove()
        if self._migration:
            ReceivedImages.remove_left(self._migration)
            target_tmpfs.remove(self._migration)
        if self._files is not None:
            self._files.undo()


def _verdict(where: str, *, since: str = "", reason: str = "") -> dict[str, Any]:
    return {"workload": where, "since": since, "reason": reason}


def _known(migration: str) -> Entry | None:
    """Return the journal's entry of a move into this host."""
    entry = journal.load(migration)
    return entry if entry is not None and entry.role == "target" else None


def _end_old_agent(agent: dict[str, Any]) -> None:
    """The agent of a lost connection may not have noticed yet: end it, so that only one of us acts."""
    pid, start = agent.get("pid", 0), agent.get("start_time")
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, TypeError):
        return
    try:
        if pid == os.getpid() or processes.start_time(pid) != start:
            return
        for number in (signal.SIGTERM, signal.SIGCONT):  # it may be stopped
            signal.pidfd_send_signal(pidfd, number)
        if not processes.wait_exit(pidfd, OLD_AGENT_TIMEOUT):
            raise DeadlineExceeded(f"the agent of the lost connection (process {pid}) does not end")
    finally:
        os.close(pidfd)
