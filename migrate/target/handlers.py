"""What the target does for each call: one class for each stage of the conversation, with what is known at that stage.

`wire/order.py` says which call is allowed when, and the agent checks that before it calls a handler: so handlers check
no order. A method bears the name of its call (OpenBundle: `open_bundle`), and sets `next` where the stage changes.

Until Resume, whatever goes wrong ends in `abort`: the restored tree is killed before it has run an instruction, and
container and images are removed; so are files that are new, unless they are worth keeping for the next attempt. The one
exception: once the tree is held, a lost connection leaves the images (the source may be dead already, by decision),
until `settle` brings the verdict.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import ClassVar, Self

from criu_rpc import messages
from criu_rpc.errors import CriuError, Error
from migrate.disk import write_atomically
from migrate.errors import ProtocolError
from migrate.files import receivers
from migrate.files.trees import Owner
from migrate.limits import FROZEN_SILENCE, SEED_SILENCE, TRIAL_SILENCE
from migrate.memory import lazy_support
from migrate.phases import Phase
from migrate.target import image_cleanup, memory, settle
from migrate.target import tmpfs as target_tmpfs
from migrate.target import trees as tree_store
from migrate.target.images import ReceivedImages, ReceivedPages
from migrate.target.incoming import Incoming, open_store, require_new
from migrate.target.memory import ArrivingMemory
from migrate.wire import protocol, records, replies
from migrate.wire.order import Stage
from migrate.wire.questions import HostFacts
from migrate.wire.replies import Done
from runtime.checkpoint.restore import Restoring
from runtime.state.record import check_id
from runtime.state.store import Store


class Handler:
    """One stage or several. `next` handles the call after this one."""

    stages: ClassVar[frozenset[Stage]] = frozenset()

    def __init__(self) -> None:
        self.next: Handler = self

    @property
    def idle_timeout(self) -> float:
        """Seconds that the source may be silent: long while rsync runs beside the agent, short in the freeze."""
        return SEED_SILENCE

    @property
    def activity(self) -> int:
        """A number that changes as long as something is done to receive files."""
        return 0

    @property
    def inputs(self) -> list[int]:
        """Descriptors beside the connection that `read` has to be called for when they are readable."""
        return []

    def read(self, fd: int) -> None:
        """Read from one of `inputs`. Raises ProtocolError."""

    def abort(self, _call: protocol.Abort) -> Done:
        """Undo everything. Harmless when there is nothing to undo."""
        self.undo()
        self.next = Aborted()
        return Done()

    def undo(self) -> None:
        """Remove everything that the move has brought. Raises DeadlineExceeded."""

    def tidy(self) -> None:
        """Do what can wait until a reply has been sent."""

    def idle(self) -> None:
        """The source has been silent for a moment: prepare for what it will ask. Quick if that was done before."""

    def lost(self) -> None:
        """The connection has ended: undo, unless the source may have given the container up."""
        with contextlib.suppress(Error, OSError):
            self.undo()


class Connected(Handler):
    """Nothing is known yet."""

    stages = frozenset({Stage.CONNECTED})
    idle_timeout = 60.0

    def hello(self, call: protocol.Hello) -> replies.Welcome:
        if call.version != protocol.VERSION:
            raise ProtocolError(
                f"the source speaks protocol {call.version}, this agent {protocol.VERSION}: "
                "both hosts need the same version of pymigrate"
            )
        self.next = Greeted(open_store(call.root))
        return replies.Welcome(protocol.VERSION, os.uname().nodename, os.getpid())


class Aborted(Handler):
    """Everything is undone."""

    stages = frozenset({Stage.ABORTED})


class Greeted(Handler):
    """The state directory is known; the source asks, settles earlier moves, or begins one."""

    stages = frozenset({Stage.GREETED})

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store, self._later = store, contextlib.ExitStack()

    def facts(self, call: protocol.Facts) -> HostFacts:
        from migrate.preflight.hostfacts import gather

        return gather(call.query)

    def check_ports(self, call: protocol.CheckPorts) -> replies.PortsChecked:
        from migrate.preflight import ports

        return ports.answer(call)

    def check_trees(self, call: protocol.CheckTrees) -> replies.TreesChecked:
        return tree_store.check(call, self._owner(call.id, call.created))

    def check_files(self, call: protocol.CheckFiles) -> replies.FilesSeen:
        from migrate.preflight import open_files

        return open_files.answer(call)

    def discard(self, call: protocol.Discard) -> Done:
        settle.discard(call.migrations)
        return Done()

    def settle(self, call: protocol.Settle) -> replies.Settled:
        return settle.settle(self._store, call, self._later)

    def open_bundle(self, call: protocol.OpenBundle) -> replies.Opened:
        owner = self._owner(call.id, call.created)
        require_new(call.migration)
        settle.close_older(owner)
        incoming, reply = Incoming.open(self._store, owner, call)
        self.next = Seeding(incoming)
        return reply

    def trial_begin(self, _call: protocol.TrialBegin) -> replies.MemoryReady:
        self.next = Trial(self._store)
        return memory.ready()

    def _owner(self, container_id: str, created: str) -> Owner:
        return Owner(check_id(container_id), created, str(self._store.root))

    def tidy(self) -> None:
        self._later.close()

    def idle(self) -> None:
        with contextlib.suppress(CriuError):  # Facts says what is missing
            messages.rpc()  # imports 30 ms of protobuf

    def lost(self) -> None:
        self._later.close()


class Trial(Handler):
    """The source measures the connection. Nothing is kept of what comes."""

    stages = frozenset({Stage.TRIAL})
    idle_timeout = TRIAL_SILENCE

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store, self._trial = store, memory.Trial()

    def memory(self, payload: memoryview) -> None:
        self._trial.add(payload)

    def memory_sync(self, _call: protocol.MemorySync) -> Done:
        return Done()

    def trial_end(self, call: protocol.TrialEnd) -> Done:
        self._trial.end(call.size)
        self.next = Greeted(self._store)
        return Done()


class Seeding(Handler):
    """Files come over channels of their own."""

    stages = frozenset({Stage.SEEDING})

    def __init__(self, incoming: Incoming) -> None:
        super().__init__()
        self._incoming = incoming

    @property
    def activity(self) -> int:
        return receivers.activity(self._incoming.migration)

    def bundle_sent(self, call: protocol.BundleSent) -> Done:
        """Check what rsync has brought."""
        self._incoming.files.bundle_sent(call.fingerprint)
        return Done()

    def trees_sent(self, _call: protocol.TreesSent) -> Done:
        """Check what must not have changed, and wait until the disks have what has come so far."""
        self._incoming.files.trees_sent()
        return Done()

    def prepare(self, call: protocol.Prepare) -> replies.Prepared:
        """Make everything around the container: directories, network namespace, cgroup, monitor, waiting CRIU."""
        room = Room.make(self._incoming, call)
        self.next = Ready(room)
        return replies.Prepared(room.tmpfs, room.restoring.memory_cgroup, room.images.reason)

    def undo(self) -> None:
        self._incoming.undo()


class Room:
    """Everything around the container, made by Prepare: where images come to, tmpfs mounts, a CRIU that waits.

    `tmpfs`: place in the container -> path here. `limits`: what the mounts at those paths are limited to in the end.
    `timeout`: for how many seconds the container may be frozen.
    """

    def __init__(
        self, incoming: Incoming, images: ReceivedImages, tmpfs: dict[str, str], limits: dict[str, str],
        restoring: Restoring, timeout: float,
    ) -> None:  # fmt: skip
        self.incoming, self.images, self.tmpfs, self.limits = incoming, images, tmpfs, limits
        self.restoring, self.timeout = restoring, timeout
        self.memory: ArrivingMemory | None = None
        self._is_stopped = False

    @classmethod
    def make(cls, incoming: Incoming, call: protocol.Prepare) -> Self:
        """What a failure leaves is removed by `Incoming.undo`.

        Raises Error, OSError.
        """
        migration = incoming.migration
        mounted = call.tmpfs if shutil.which("rsync") else []  # without rsync they stay with CRIU
        tmpfs = target_tmpfs.places(migration, mounted)
        plan = {
            "stdio": call.stdio, "state": records.encode(call.state), "tcp_close": call.tcp_close,
            "timeout": call.timeout, "tmpfs": tmpfs,
        }  # fmt: skip
        incoming.log.record(Phase.SEED, plan=plan)
        image_cleanup.sweep()
        with contextlib.ExitStack() as failed:
            freed = call.lazy and not lazy_support.problem()
            images = ReceivedImages.make(migration, call.memory, freed=freed)
            failed.callback(images.remove)
            limits = target_tmpfs.make(migration, mounted)
            restoring = incoming.begin_restore(images, plan)
            failed.callback(restoring.abort)
            images.await_keeper()
            failed.pop_all()
        return cls(incoming, images, tmpfs, limits, restoring, call.timeout)

    def stop(self) -> None:
        """End every process that this move has started here; files stay."""
        try:
            receivers.end(self.incoming.migration)
        finally:
            if not self._is_stopped:
                if self.memory is not None:
                    self.memory.leave()
                self.restoring.abort()
                self._is_stopped = True
                if self.memory is not None:
                    self.memory.close()

    def undo(self) -> None:
        """Undo the whole move. Raises DeadlineExceeded."""
        self.stop()
        self.images.remove()
        self.incoming.undo()


class InRoom(Handler):
    """All is made that a restore needs."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self._room = room

    @property
    def idle_timeout(self) -> float:
        return self._room.timeout + FROZEN_SILENCE

    @property
    def activity(self) -> int:
        return receivers.activity(self._room.incoming.migration)

    @property
    def inputs(self) -> list[int]:
        memory = self._room.memory
        return memory.streams.inputs if memory is not None and memory.streams is not None else []

    def read(self, fd: int) -> None:
        if self._room.memory is not None and self._room.memory.streams is not None:
            self._room.memory.streams.read(fd)

    def memory(self, payload: memoryview) -> None:
        """Take a piece of the container's memory. Raises ProtocolError."""
        if self._room.memory is None:
            raise ProtocolError("a MEMORY frame came without MemoryBegin")
        self._room.memory.add(payload)

    def undo(self) -> None:
        self._room.undo()


class Ready(InRoom):
    """The source is about to freeze the container; tmpfs mounts are sent meanwhile."""

    stages = frozenset({Stage.READY})
    idle_timeout = SEED_SILENCE

    def memory_begin(self, call: protocol.MemoryBegin) -> replies.MemoryReady:
        """Make a store for the container's memory."""
        if self._room.memory is not None:
            raise ProtocolError("MemoryBegin came twice")
        room = self._room
        room.memory = ArrivingMemory(room.images.path, call.digest, room.restoring, call.streams)
        return memory.ready(room.memory.streams)

    def memory_streams(self, _call: protocol.MemoryStreams) -> Done:
        """Wait for the streams that the source has opened."""
        if self._room.memory is not None and self._room.memory.streams is not None:
            self._room.memory.streams.accept()
        return Done()

    def memory_sync(self, call: protocol.MemorySync) -> Done:
        if self._room.memory is not None:
            self._room.memory.await_streams(call.sizes)
            self._room.memory.sync()
        return Done()

    def pages_begin(self, call: protocol.PagesBegin) -> Done:
        self._room.incoming.log.record(Phase.STOP_AND_COPY)
        self.next = Pages(self._room, ReceivedPages.start(self._room.images.path, self._room.timeout, call.digest))
        return Done()


class Pages(InRoom):
    """Memory pages come, and go to a page server."""

    stages = frozenset({Stage.PAGES})

    def __init__(self, room: Room, pages: ReceivedPages) -> None:
        super().__init__(room)
        self._pages = pages

    def stream(self, payload: memoryview) -> None:
        """A piece of the page stream. A dead server shows at PagesEnd."""
        self._pages.feed(payload)

    def pages_end(self, call: protocol.PagesEnd) -> Done:
        """The page server has written everything when this answers."""
        self.next = Images(self._room)  # whatever comes of the pages: `finish` leaves no server
        self._pages.finish(call.size, call.digest)
        return Done()

    def undo(self) -> None:
        self._pages.kill()
        super().undo()


class Images(InRoom):
    """The other images come."""

    stages = frozenset({Stage.IMAGES, Stage.IMAGE})

    def image(self, call: protocol.Image) -> None:
        self._room.images.begin(call.name)

    def stream(self, payload: memoryview) -> None:
        """A piece of the image."""
        self._room.images.write(payload)

    def image_end(self, call: protocol.ImageEnd) -> None:
        self._room.images.end(call.size, call.digest)

    def memory_end(self, call: protocol.MemoryEnd) -> Done:
        """Complete the store."""
        if self._room.memory is None:
            raise ProtocolError("MemoryEnd came without MemoryBegin")
        self._room.memory.end(call.streams, call.shared)
        return Done()

    def restore(self, call: protocol.Restore) -> replies.Restored:
        """Restore and hold, in the time of the call. The container's init, which has not run, is in the reply."""
        room = self._room
        receivers.forbid(room.incoming.migration)  # the source has seen all of them end
        room.images.check(call.count)
        if call.roots.keys() != room.tmpfs.keys():
            raise ProtocolError("Restore is about other tmpfs mounts than Prepare was")
        for place, root in call.roots.items():
            root.give(room.tmpfs[place])
        target_tmpfs.narrow(room.limits)
        if room.memory is not None:
            pid = room.memory.restore(call.timeout, lazily=call.lazy)
        else:
            pid = room.restoring.restore(call.timeout)
        room.images.hold()
        room.incoming.log.record(Phase.PREPARED, durable=False)
        self.next = Held(room)
        return replies.Restored(pid)


class Held(InRoom):
    """The container is restored, and has not run."""

    stages = frozenset({Stage.HELD})

    def confirm(self, _call: protocol.Confirm) -> Done:
        """Answer that the restored tree is still held. Raises CriuError, ContainerError when it is not."""
        self._room.restoring.require_held()
        return Done()

    def resume(self, _call: protocol.Resume) -> replies.Resumed:
        """The container runs from here on, whatever else happens."""
        self._room.images.decided()
        state = self._room.restoring.resume()
        if self._room.memory is not None:
            self._room.memory.resumed()
        self.next = Running(self._room)
        self._room.incoming.resumed()
        return replies.Resumed(state.pid)

    def lost(self) -> None:
        """The source may have ended the container: its images stay."""
        with contextlib.suppress(Error, OSError):
            self._room.stop()
            self._room.images.leave()


class Running(InRoom):
    """The container runs here."""

    stages = frozenset({Stage.RUNNING})

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        self._is_tidy = False

    def history(self, call: protocol.History) -> Done:
        """Keep what the container had written before it came here."""
        files = self._room.incoming.files
        write_atomically(Path(self._room.restoring.history_path), call.log.encode())
        files.flush()
        files.note_use()
        return Done()

    def tidy(self) -> None:
        if not self._is_tidy:
            self._is_tidy = True
            self._room.incoming.clean(self._room.images)

    def lost(self) -> None:
        self.tidy()


BY_STAGE = {stage: cls for cls in (Connected, Greeted, Trial, Seeding, Ready, Pages, Images, Held, Running, Aborted)
            for stage in cls.stages}  # fmt: skip
