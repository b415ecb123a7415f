"""One move into this host: its files, its journal, and how all of it is undone.

Images go where target/image_places.py says; files go to places that are new, or that a mark says are this container's
(target/files.py). What each call does is in handlers.py; settle.py ends a move whose connection was lost.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, Self

from criu_rpc.client import Criu
from criu_rpc.errors import Error
from migrate.errors import ProtocolError
from migrate.files import receivers
from migrate.files.trees import Owner
from migrate.journal import journal
from migrate.journal.journal import Entry, Journal
from migrate.phases import NEXT, Phase
from migrate.target import tmpfs as target_tmpfs
from migrate.target.files import Arriving
from migrate.target.images import ReceivedImages
from migrate.wire.protocol import OpenBundle
from migrate.wire.replies import Opened
from runtime.checkpoint.restore import Restoring
from runtime.checkpoint.restore_criu import RestorePlan
from runtime.linux import processes
from runtime.spec import config as spec_config
from runtime.state.record import check_id
from runtime.state.store import Store


class Incoming:
    """What is known of a move from OpenBundle on, whichever process carries it out."""

    def __init__(self, store: Store, owner: Owner, files: Arriving, log: Journal) -> None:
        self.store, self.owner, self.files, self.log = store, owner, files, log
        self.migration = log.entry.migration

    @classmethod
    def open(cls, store: Store, owner: Owner, call: OpenBundle) -> tuple[Self, Opened]:
        """Find the bundle at a hint, or make a place for it, and for the trees that come along.

        A failure leaves nothing but its journal. Raises ProtocolError, TargetError, NoSpace, OSError.
        """
        files, reply = Arriving.plan(call, owner)
        try:
            log = Journal.begin(
                call.migration,
                role="target",
                id=owner.id,
                source=call.source,
                target=os.uname().nodename,
                root=owner.root,
                agent={"pid": os.getpid(), "start_time": processes.start_time(os.getpid())},
                created=owner.created,
                **files.fields,
            )
        except BaseException:
            files.undo()
            raise
        incoming = cls(store, owner, files, log)
        try:
            files.make()
            receivers.allow(call.migration)
        except BaseException:
            incoming.undo()
            raise
        return incoming, reply

    @classmethod
    def resume(cls, store: Store, entry: Entry) -> Self:
        """Go on with a move that another agent has begun, and that has ended. Raises ProtocolError, InvalidId."""
        owner = Owner(check_id(entry.id), str(entry.fields.get("created", "")), str(store.root))
        files = Arriving.resume(entry, owner)
        return cls(store, owner, files, Journal.resume(entry))

    def begin_restore(self, images: ReceivedImages, fields: dict[str, Any]) -> Restoring:
        """Make everything around the container, and have a CRIU wait. `fields` are the journal's plan (see `Room`).

        A failure leaves nothing of it.
        """
        bundle, carried = self.files.bundle, dict(fields["state"])
        annotations = {str(key): str(value) for key, value in dict(carried.get("annotations", {})).items()}
        loaded = spec_config.load(bundle, annotations)
        plan = RestorePlan(
            id=self.owner.id,
            bundle=str(bundle),
            images=str(images.path),
            work=str(images.path),
            stdio=tuple(fields["stdio"]),
            carried=carried,
            move=self.migration,
            source=self.log.entry.source,
            options={"tcp_close": True} if fields.get("tcp_close") else {},
            mounted=fields.get("tmpfs", {}),
        )
        return Restoring.prepare(self.store, loaded, plan, Criu())

    def resumed(self) -> None:
        """The container runs: say so in the journal, and give its files to it. Raises NoSpace, MigrateError."""
        for phase in (Phase.PREPARED, Phase.COMMITTED):  # the line of the first may be lost
            if phase in NEXT[self.log.phase] and phase is not self.log.phase:
                self.log.record(phase, durable=False)
        self.log.record(Phase.RESUMED)
        self.files.confirm()

    def clean(self, images: ReceivedImages | None) -> None:
        """Remove what has brought the container, which runs."""
        with contextlib.suppress(Error, OSError):  # `migrations --clean` does it
            if images is not None:
                images.remove()
            ReceivedImages.remove_left(self.migration)
            target_tmpfs.remove(self.migration)

    def undo(self) -> None:
        """Remove everything that the move has brought; no process of it but receivers may be left.

        Files that are worth it stay for the next attempt. Raises DeadlineExceeded, NoSpace, MigrateError.
        """
        receivers.end(self.migration)
        ReceivedImages.remove_left(self.migration)
        target_tmpfs.remove(self.migration)
        self.files.undo()
        self.log.record(Phase.ABORTED)


def require_new(migration: str) -> None:
    """Raise ProtocolError when this host knows a migration already."""
    if journal.load(migration) is not None:
        raise ProtocolError(f"migration {migration} is known here already")


def open_store(root: str) -> Store:
    """The directory of container states that the source's user chose. Raises ProtocolError."""
    path = Path(root)
    if not path.is_absolute() or ".." in path.parts or "\0" in root:
        raise ProtocolError(f"{root!r} is not a state directory")
    return Store(path)
