"""Receive a container: image files by name, and the page stream, each checked by size and digest."""

import contextlib
import hashlib
import os
import shutil
import socket
from pathlib import Path
from typing import Self

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError
from criu_rpc.swrk import PageServer
from migrate.disk import FULL, is_full, sync
from migrate.errors import DeadlineExceeded, MigrateError, ProtocolError, TargetError
from migrate.journal import journal
from migrate.limits import IMAGES_LOCK_TIMEOUT
from migrate.target import image_keeper, image_manifest, image_places, tmpfs_archive
from migrate.target.image_keeper import Keeper
from migrate.target.image_manifest import Manifest
from migrate.target.image_places import Kind, NoMemory
from migrate.wire import digests
from migrate.wire.codec import Unpacker
from migrate.wire.frames import MAX_IMAGE


class ReceivedImages:
    """The directory of one migration's images, and the image that is being written.

    `kind` says where the directory is; `reason` is why a new one is not in memory, in words, or "".
    """

    def __init__(self, migration: str, path: Path, kind: Kind, lock: int | None = None, reason: str = "") -> None:
        """`lock` is a descriptor of image_places.lock, closed by `remove` and `leave`."""
        self.migration, self.path, self.kind, self.reason = migration, path, kind, reason
        self._lock = lock
        self._keeper: Keeper | None = None
        self._fd = -1
        self._name, self._size = "", 0
        self._hash = hashlib.sha256()
        self._digests: dict[str, str] = {}
        self._unwritten = 0
        self._failure: Exception | None = None

    @classmethod
    def make(cls, migration: str, expected: int = 0, *, freed: bool = False) -> Self:
        """Make a directory for images, in memory if `expected` bytes fit there, and start their keeper.

        `freed`: see image_places.room. Raises OSError.
        """
        kind: Kind = "memory"
        reason = ""
        try:
            path = image_places.make_memory(migration, expected, freed=freed)
        except (NoMemory, DeadlineExceeded) as error:
            path, kind, reason = image_places.make_disk(migration), "disk", str(error)
        images = cls(migration, path, kind, reason=reason)
        try:
            images._lock = image_places.lock(path)
            images._keeper = Keeper.start(migration, path, kind, images._lock)
        except BaseException:
            images.remove()
            raise
        return images

    @classmethod
    def existing(cls, migration: str) -> Self | None:
        """Return the images of a move whose agent has exited, wherever they are; None unless all of them had come.

        Their keeper is killed first. A directory of an earlier version, without a manifest, is taken as it is.
        Raises TargetError when another process uses them, DeadlineExceeded.
        """
        memory, disk = image_places.MEMORY / migration, image_places.DISK / migration
        image_keeper.end_left(memory, disk)
        shutil.rmtree(image_places.unfinished(migration), ignore_errors=True)
        in_memory = (memory / image_manifest.NAME).exists()
        if not in_memory and not disk.exists():
            return None
        path = memory if in_memory else disk
        lock = image_places.lock(path, IMAGES_LOCK_TIMEOUT)
        if lock is None:
            raise TargetError(f"{path}: another process uses these images")
        return cls(migration, path, "memory" if in_memory else "disk", lock)

    @classmethod
    def remove_left(cls, migration: str) -> None:
        """Remove all images of a move whose agent has exited, complete or not. Harmless when there are none.

        Raises DeadlineExceeded.
        """
        image_keeper.end_left(image_places.MEMORY / migration, image_places.DISK / migration)
        image_places.remove(migration)

    def begin(self, name: str) -> None:
        """A new image comes. A failure here, or in `write` and `end`, is kept for `check`: these have no reply."""
        self._name, self._size, self._hash = name, 0, hashlib.sha256()
        try:
            self._fd = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            self._failure = self._failure or error

    def write(self, payload: memoryview) -> None:
        """The next bytes of the image. Raises ProtocolError when it is too large for an image."""
        self._size += len(payload)
        if self._size > MAX_IMAGE:
            raise ProtocolError(f"image {self._name} is larger than {MAX_IMAGE >> 30} GiB")
        self._hash.update(payload)
        if self._fd >= 0 and self._failure is None:
            try:
                left = payload
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError as error:
                error.filename = str(self.path / self._name)
                self._failure = error
        if self._failure is not None:
            self._unwritten += len(payload)

    def end(self, size: int, digest: str) -> None:
        """The image has come: it counts only if it is what the source has read."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._digests[self._name] = digest
        if (self._size, self._hash.hexdigest()) != (size, digest):
            self._failure = self._failure or TargetError(f"image {self._name} arrived damaged")

    def check(self, count: int) -> None:
        """Raise the first failure of any image. All `count` images must be here."""
        if isinstance(self._failure, OSError) and self._failure.errno in FULL:
            raise image_places.full(self.path, self._unwritten)
        if self._failure is not None:
            raise self._failure
        if len(self._digests) != count:
            raise ProtocolError(f"{len(self._digests)} of {count} images have come")

    def await_keeper(self) -> None:
        """Wait until the keeper is ready, before anything is frozen."""
        if self._keeper is not None:
            self._keeper.await_ready()

    def hold(self) -> None:
        """Have the images outlive this process, because they may become the last copy of the container.

        The keeper takes them to the disk unless the outcome comes within a second, or when this process exits earlier.
        Raises OSError.
        """
        Manifest.of(self.migration, self.path, self._digests).save(self.path, durable=False)
        if self._keeper is not None:
            self._keeper.watch()

    def decided(self) -> None:
        """The outcome is known: stop the keeper, without waiting for it."""
        if self._keeper is not None:
            self._keeper.kill()

    def leave(self) -> None:
        """Leave images and journal to the disk, because this process exits and the outcome is unknown.

        A living keeper writes them; without one they are on the disk when this returns. Raises TargetError, OSError.
        """
        try:
            if self._keeper is None or not self._keeper.leave():
                self.persist()
        finally:
            self._unlock()

    def persist(self, *, keep: bool = False) -> None:
        """Write images, manifest and journal to the disk; unless `keep`, remove them from memory.

        Raises TargetError when an image differs from what has come, OSError; everything then stays as it was.
        """
        _sync_files(self.migration)
        if self.kind == "disk":
            self._settle_at(self.path)
        else:
            path, unfinished = image_places.DISK / self.migration, image_places.unfinished(self.migration)
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)  # a copy whose original is still there
            try:
                image_places.make_disk(unfinished.name)
                self._settle_at(unfinished)
                unfinished.rename(path)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        sync(image_places.DISK)
        journal.sync(self.migration)
        if self.kind == "memory" and not keep:
            image_places.remove_memory(self.migration)
            self.path, self.kind = path, "disk"

    def _settle_at(self, place: Path) -> None:
        """Put all images into `place`, synced, with a manifest that has every digest."""
        known = Manifest.load(self.path)
        if known is None and self.kind == "memory":
            raise TargetError(f"{self.path}: not all images had come")
        if known is None:  # of an earlier version: nothing says what has come
            return
        images: dict[str, tuple[int, str | None]] = {}
        for name, (size, digest) in known.images.items():
            found = image_manifest.copy(self.path / name, place / name)
            if found[0] != size or digest not in (None, found[1]):
                raise TargetError(f"{self.path / name}: is damaged")
            images[name] = found
        if tmpfs_archive.INDEX not in images:
            with contextlib.suppress(TargetError, OSError):  # without these, the images still outlive a power cut
                images |= tmpfs_archive.pack(self.migration, place)
        Manifest(self.migration, known.boot, images).save(place, durable=True)
        sync(place)

    def verify(self) -> None:
        """Raise TargetError unless every image is what has come; it names a damaged, missing or unlisted one.

        Page images that have not been on the disk yet are compared by size alone. A directory of an earlier version has
        no manifest to compare with (`has_manifest`).
        """
        manifest = Manifest.load(self.path)
        if manifest is not None:
            manifest.verify(self.path)

    @property
    def has_manifest(self) -> bool:
        """True if `verify` can tell whether the images are complete."""
        return (self.path / image_manifest.NAME).exists()

    def remove(self) -> None:
        """Remove the images, wherever they are."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._keeper is not None:
            with contextlib.suppress(DeadlineExceeded):  # it waits for a disk, and does nothing after that
                self._keeper.end()
            self._keeper = None
        image_places.remove(self.migration)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync_files(migration: str) -> None:
    """Write the files of a move to the disk: images are useless with files that a power cut has taken.

    Raises OSError.
    """
    from migrate.files.trees import Owner
    from migrate.target.files import Arriving

    with contextlib.suppress(MigrateError):  # the images are kept without what a damaged journal says
        entry = journal.load(migration)
        if entry is not None:
            owner = Owner(entry.id, str(entry.fields.get("created", "")), str(entry.fields.get("root", "")))
            Arriving.resume(entry, owner).flush()


class ReceivedPages:
    """Passes the page stream to CRIU's page server through a socketpair."""

    def __init__(self, images: Path, server: PageServer, ours: socket.socket, timeout: float, digest: str) -> None:
        self._images, self._server, self._socket, self._timeout = images, server, ours, timeout
        self._size, self._hash, self._unpacker = 0, digests.new(digest), Unpacker()
        self._broken = False

    @classmethod
    def start(cls, images: Path, timeout: float, digest: str) -> Self:
        """Start a page server, which is waited for `timeout` seconds at most. `digest` is a name of digests.py.

        Raises ProtocolError for an unknown digest.
        """
        digests.new(digest)
        ours, theirs = socket.socketpair()
        with theirs:
            server = Criu().page_server(images, theirs)
        ours.settimeout(timeout)
        return cls(images, server, ours, timeout, digest)

    def feed(self, payload: memoryview) -> None:
        """Pass a piece on. A server that is dead, or whose disk is full, takes nothing: `finish` says why.

        Raises ProtocolError for a payload that is malformed.
        """
        data = self._unpacker.unpack(payload)
        self._size += len(data)
        self._hash.update(data)
        if not self._broken:
            try:
                self._socket.sendall(data)
            except OSError:
                self._broken = True

    def finish(self, size: int, digest: str) -> None:
        """Wait until the page server has exited. Raises TargetError unless it has had all that was sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(4096):  # its answers, which the source has given CRIU in its place
                pass
        self._socket.close()
        try:
            self._server.wait(self._timeout)
        except (CriuError, DeadlineExceeded) as error:
            if is_full(self._images, error):
                missing = size - sum(path.stat().st_size for path in self._images.iterdir())
                raise image_places.full(self._images, missing) from None
            raise
        if (self._size, self._hash.hexdigest()) != (size, digest):
            raise TargetError("the memory pages arrived damaged")

    def kill(self) -> None:
        self._socket.close()
        self._server.kill()
