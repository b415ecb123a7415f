"""The memory of a container that arrives: the store is filled while the container still runs at the source.

What CRIU's page maps list as lazy must be in the store before the container is restored, page by page: `check`. It then
comes into the restored processes by the page handler (lazy), or as CRIU's own images (`materialize`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from criu_rpc import pagemap
from migrate.disk import FULL
from migrate.errors import ProtocolError, TargetError
from migrate.memory import layout, lazy_support, store
from migrate.memory.handler import PageHandler
from migrate.memory.layout import OBJECTS, PAGE
from migrate.memory.store import Pages, Quota, Store
from migrate.target import image_places
from migrate.target.shared_memory import SharedStores
from migrate.target.streams import Streams
from migrate.wire import digests
from migrate.wire.codec import Unpacker
from migrate.wire.frames import MAX_TRIAL
from migrate.wire.protocol import Sent
from migrate.wire.replies import MemoryReady
from runtime.checkpoint.restore import Restoring


class _Sequence:
    """The bodies that come over one connection, in their order."""

    def __init__(self, digest: str) -> None:
        """`digest` is a name of digests.py. Raises ProtocolError for an unknown one."""
        self._digest, self._unpacker, self.size = digests.new(digest), Unpacker(), 0

    def unpack(self, payload: memoryview) -> memoryview:
        """Return the body in the payload of a MEMORY frame. Raises ProtocolError."""
        body = self._unpacker.unpack(payload)
        self.size += len(body)
        self._digest.update(body)
        return body

    @property
    def sent(self) -> Sent:
        """What the source must have sent."""
        return Sent(self.size, self._digest.hexdigest())


class ArrivingMemory:
    """The store of one move in the directory of its images, and the page handler that will serve it.

    Memory comes over the agent's own connection, 0, and over more `streams` (streams.py), if the move has any.
    """

    def __init__(self, images: Path, digest: str, restoring: Restoring, streams: int = 0) -> None:
        """Make an empty store, which may fill the memory that is free for images. `digest` is a name of digests.py.

        Raises ProtocolError for an unknown digest, OSError.
        """
        self.lazy_problem = lazy_support.problem()
        self._handler: PageHandler | None = None
        self._restoring = restoring
        self._sequences = [_Sequence(digest) for _ in range(1 + streams)]
        space = os.statvfs(images)
        self._images = images
        quota = Quota(space.f_bavail * space.f_frsize)
        self._store, self._shared = Store(images, quota), SharedStores(images, quota)
        self._failure: OSError | None = None
        self.streams = Streams(images, streams, self._add) if streams else None
        if not self.lazy_problem:
            self._handler = PageHandler.start(images, Path(restoring.memory_note))

    def add(self, payload: memoryview) -> None:
        """Take the payload of a MEMORY frame. A failure to keep it is raised by `sync`. Raises ProtocolError."""
        self._add(0, payload)

    def _add(self, number: int, payload: memoryview) -> None:
        body = self._sequences[number].unpack(payload)
        if self._failure is None:
            try:
                (self._shared if layout.space(body) >= OBJECTS else self._store).add(body)
            except OSError as error:
                error.filename = str(self._images)
                self._failure = error

    def await_streams(self, sizes: Sequence[int]) -> None:
        """Wait until so many bytes of bodies have come over each connection. Raises ProtocolError, TargetError."""
        if len(sizes) != len(self._sequences):
            raise ProtocolError(f"sizes of {len(sizes)} streams came, there are {len(self._sequences)}")
        if self.streams is not None:
            pairs = list(zip(self._sequences, sizes, strict=True))
            self.streams.read_until(lambda: all(one.size >= size for one, size in pairs))

    def sync(self) -> None:
        """Raise the failure of any piece so far."""
        if self._failure is not None:
            if self._failure.errno in FULL:
                raise image_places.full(self._images, PAGE)
            raise self._failure

    def end(self, sent: Sequence[Sent], shared: Mapping[str, int]) -> None:
        """Everything was sent. `shared` is that of MemoryEnd.

        Raises TargetError if it arrives damaged or something is missing, OSError, ProtocolError.
        """
        self.await_streams([one.size for one in sent])
        self.sync()
        if [one.sent for one in self._sequences] != list(sent):
            raise TargetError("the container's memory arrived damaged")
        self._close_streams()
        self._store.finish()
        self._store.close()
        self._shared.finish(shared)

    def restore(self, timeout: float, *, lazily: bool) -> int:
        """Restore the container, held, within `timeout` seconds; return its init's pid. All images must be here.

        With `lazily` memory is filled in by the page handler, later. Raises TargetError when the store lacks some of
        it, and what Restoring.restore raises.
        """
        if lazily and self._handler is not None:
            return restore_lazily(self._restoring, self._handler, timeout)
        self._end_handler()
        check(self._images)
        materialize(self._images)
        return self._restoring.restore(timeout)

    def resumed(self) -> None:
        """The container runs: memory that is missing comes into it by and by, and the store is freed."""
        if self._handler is not None:
            handler, self._handler = self._handler, None
            handler.resumed()
            handler.leave()

    def leave(self) -> None:
        """The restore is about to be aborted: the page handler ends when the tree does."""
        if self._handler is not None:
            self._handler.leave()

    def close(self) -> None:
        """The tree is dead, or there never was one. Raises DeadlineExceeded."""
        self._close_streams()
        self._store.close()
        self._shared.close()
        self._end_handler()

    def _close_streams(self) -> None:
        if self.streams is not None:
            self.streams.close()

    def _end_handler(self) -> None:
        if self._handler is not None:
            handler, self._handler = self._handler, None
            handler.await_end()


def restore_lazily(restoring: Restoring, handler: PageHandler, timeout: float) -> int:
    """Restore a container whose memory `handler` serves from the store beside its images.

    Raises TargetError, DeadlineExceeded, and what Restoring.restore raises.
    """
    handler.await_ready()
    handler.place(restoring.cgroup)
    handler.load()
    handler.await_loaded()
    return restoring.restore(timeout, lazy_pages=True)


class Trial:
    """Memory that comes only to measure how fast it comes: it is looked at like other memory, and not kept."""

    def __init__(self) -> None:
        self._unpacker, self._size = Unpacker(), 0

    def add(self, payload: memoryview) -> None:
        """Take the payload of a MEMORY frame. Raises ProtocolError, also when more comes than a trial may send."""
        body = self._unpacker.unpack(payload)
        layout.parse(body)
        self._size += len(body)
        if self._size > MAX_TRIAL:
            raise ProtocolError(f"a trial sends more than {MAX_TRIAL} bytes")

    def end(self, size: int) -> None:
        """Raise TargetError unless `size` bytes of bodies have come."""
        if size != self._size:
            raise TargetError("the memory of a trial arrived damaged")


def ready(streams: Streams | None = None) -> MemoryReady:
    """Return how this host can restore memory that is sent ahead. `streams`: more that are expected."""
    command = streams.command if streams is not None else []
    return MemoryReady(lazy_support.problem(), lazy_support.is_for_everybody(), command)


def check(images: Path) -> None:
    """Raise TargetError unless the store has every page that CRIU's page maps list as lazy."""
    pages = Pages.open(images)
    try:
        for name, space, entries in _maps(images):
            lazy = [(entry.address, entry.address + entry.pages * PAGE) for entry in pagemap.lazy(entries)]
            for start, end in pages.missing(space, lazy):
                raise TargetError(f"{name}: memory at {start:#x} to {end:#x} of process {space} has not come")
    finally:
        pages.close()


def _maps(images: Path) -> Iterator[tuple[str, int, list[pagemap.Entry]]]:
    """Yield the page maps of all processes: name of the image, pid in the container, entries."""
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, space in pagemap.names(fd):
            yield name, space, pagemap.read(fd, name).entries
    finally:
        os.close(fd)


def materialize(images: Path) -> None:
    """Turn lazy pages into ordinary ones of CRIU's images, which then need no store. Raises TargetError, OSError."""
    pages = Pages.open(images)
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, space in list(pagemap.names(fd)):
            _materialize(fd, name, space, pages)
    finally:
        os.close(fd)
        pages.close()
    for name in (store.DATA, store.INDEX):
        os.unlink(images / name)


def _materialize(directory: int, name: str, space: int, pages: Pages) -> None:
    """Write the pages of one process anew: those that its image has, and those of the store, in order."""
    found = pagemap.read(directory, name)
    if not any(True for _ in pagemap.lazy(found.entries)):
        return
    data = f"pages-{found.pages_id}.img"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    reading = os.open(data, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with open(reading, "rb") as old, open(os.open(f"{data}.new", flags, 0o600, dir_fd=directory), "wb") as new:
        for entry in found.entries:
            if entry.flags & pagemap.PRESENT:
                new.write(old.read(entry.pages * PAGE))
            elif entry.flags & pagemap.LAZY:
                for piece in pages.run(space, entry.address, entry.pages):
                    new.write(piece)
    os.rename(f"{data}.new", data, src_dir_fd=directory, dst_dir_fd=directory)
    entries = [
        entry._replace(flags=entry.flags | pagemap.PRESENT) if entry.flags & pagemap.LAZY else entry
        for entry in found.entries
    ]
    pagemap.write(directory, name, pagemap.Pagemap(found.pages_id, entries))
