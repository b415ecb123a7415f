"""The list of the images of a move: a file beside them with the name, size and SHA-256 of each.

    manifest.json   {"format": 1, "migration": ID, "boot": ID, "images": {NAME: [SIZE, SHA-256 or null]}}

It is written when all images have come, and again, with every digest, when they are on the disk. The digest of a page
image is null at first, because it would have to be computed in the freeze. An image without a digest counts only until
the machine restarts: until then it is in memory, so no disk can have damaged it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from migrate.disk import sync, write_atomically
from migrate.errors import TargetError
from runtime.light.records import Record
from runtime.linux.processes import boot_id

FORMAT = 1
NAME = "manifest.json"
_LIMIT = 64 << 20  # bytes
_PIECE = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def names(directory: Path) -> Iterator[str]:
    """Yield the names of the images in a directory; CRIU's logs are not among them. Raises OSError."""
    with os.scandir(directory) as entries:
        yield from sorted(entry.name for entry in entries if entry.name.endswith(".img"))


class Manifest(Record):
    """`images`: name -> (size in bytes, SHA-256 in hex or None)."""

    migration: str
    boot: str
    images: dict[str, tuple[int, str | None]]

    @classmethod
    def of(cls, migration: str, directory: Path, digests: dict[str, str]) -> Self:
        """Describe the images in a directory, as far as `digests` has them. Raises OSError."""
        images = {name: ((directory / name).lstat().st_size, digests.get(name)) for name in names(directory)}
        return cls(migration, boot_id(), images)

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """Read the manifest in a directory, None when there is none. Raises TargetError when it is damaged."""
        path = directory / NAME
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TargetError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            with open(fd, "rb") as file:
                return cls._parse(json.loads(file.read(_LIMIT)), path)
        except (OSError, ValueError, RecursionError) as error:
            raise TargetError(f"{path}: cannot be read: {error}") from None

    @classmethod
    def _parse(cls, value: Any, path: Path) -> Self:
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise TargetError(f"{path}: format {str(value.get('format'))[:20]} is not known to this version")
        try:
            images = {str(name): (int(size), digest) for name, (size, digest) in value["images"].items()}
            if not all(digest is None or _DIGEST.fullmatch(digest) for _, digest in images.values()):
                raise ValueError("a digest is malformed")
            return cls(str(value["migration"]), str(value["boot"]), images)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TargetError(f"{path}: is malformed: {error}") from None

    def save(self, directory: Path, *, durable: bool) -> None:
        """Write it into a directory; `durable`: wait until the disk has it. Raises OSError."""
        data = json.dumps({"format": FORMAT, "migration": self.migration, "boot": self.boot, "images": self.images})
        if durable:
            write_atomically(directory / NAME, data.encode())
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(directory / NAME, flags, 0o600), "w") as file:
            file.write(data)

    def verify(self, directory: Path) -> None:
        """Compare every image with it. Raises TargetError that names the first damaged, missing or unlisted one."""
        try:
            present = set(names(directory))
        except OSError as error:
            raise TargetError(f"{directory}: cannot be read: {error.strerror}") from None
        if unlisted := sorted(present - set(self.images)):
            raise TargetError(f"{directory / unlisted[0]}: is not listed in {NAME}")
        unsynced = self.boot != boot_id()
        for name, (size, digest) in self.images.items():
            path = directory / name
            if name not in present:
                raise TargetError(f"{path}: is missing")
            if digest is None and unsynced:
                raise TargetError(f"{path}: this host was restarted before the image was on its disk")
            try:
                length, seen = digest_of(path) if digest is not None else (path.lstat().st_size, None)
            except OSError as error:
                raise TargetError(f"{path}: cannot be read: {error.strerror}") from None
            if (length, seen) != (size, digest):
                what = f"SHA-256 {str(seen)[:12]}..., not {str(digest)[:12]}..." if length == size else f"not {size}"
                raise TargetError(f"{path}: is damaged ({length} bytes, {what})")


def copy(source: Path, target: Path) -> tuple[int, str]:
    """Copy an image and wait for the disk; one that is there already is only synced. Returns its size and SHA-256.

    Raises OSError.
    """
    if source == target:
        found = digest_of(target)
        sync(target)
        return found
    with open(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return write(target, iter(lambda: file.read(_PIECE), b""))


def write(path: Path, pieces: Iterable[bytes]) -> tuple[int, str]:
    """Write a new image and wait for the disk. Returns its size and SHA-256. Raises OSError."""
    seen, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as out:
        for data in pieces:
            seen.update(data)
            size += len(data)
            view = memoryview(data)
            while view:
                view = view[out.write(view) :]
        os.fsync(out.fileno())
    return size, seen.hexdigest()


def digest_of(path: Path) -> tuple[int, str]:
    """Return size and SHA-256 of a file, which must not be a link. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
