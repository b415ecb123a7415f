"""Read and verify a snapshot directory: its manifest has every file's size and SHA-256, and its own digest.

For the images that hold pages there is a digest of each block (page_digests.py), whose SHA-256 the manifest has.

The digests detect damage. Write access to the files means write access to the manifest too, so a directory that users
other than root and the caller can write to is rejected before anything in it is used.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from migrate.errors import SnapshotError
from migrate.memory.image_source import is_pages
from migrate.snapshots import page_digests
from migrate.snapshots.page_digests import PageDigests
from runtime.linux import trusted

FORMAT = 3
_WITHOUT_BLOCKS = 2  # the format of earlier versions, which had the SHA-256 of whole pages images
MANIFEST, CONFIG, LOG, IMAGES = "manifest.json", "config.json", "log", "images"
_LARGEST = 16 << 20  # bytes of a manifest
_WEAK = (
    "it was made by an earlier version, whose manifest covers the images only: "
    "check config.json (its hooks run as root) and log before you restore it"
)


class SnapshotNotFound(SnapshotError):
    kind = "not-found"


@dataclass(frozen=True)
class Manifest:
    """The description of a snapshot. `images` and `files` (all others) map names to [size in bytes, SHA-256].

    `eager`: why a restore should not leave memory for later, "" if it may.
    """

    format: int
    id: str
    host: str
    created: str
    container_created: str
    criu: str
    machine: str
    kernel: str
    bundle: str
    rootfs: str
    fingerprint: str
    stdio: list[str]
    annotations: dict[str, str]
    images: dict[str, list[Any]]
    connections: list[str] = dataclasses.field(default_factory=list)  # with other hosts, as "tcp LOCAL -> REMOTE"
    files: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    eager: str = ""
    digest: str = ""  # SHA-256 of all other fields

    @property
    def size(self) -> int:
        """The bytes of all images."""
        return sum(int(size) for size, _ in self.images.values())

    def sealed(self) -> Self:
        """Return the manifest with its digest."""
        return dataclasses.replace(self, digest=self._digest())

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=2).encode() + b"\n"

    def _digest(self) -> str:
        fields = dataclasses.asdict(self)
        del fields["digest"]
        if self.format == _WITHOUT_BLOCKS:
            del fields["eager"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Return the manifest read from `path`. Raises SnapshotError naming the malformed field."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"{path}: cannot be read: {error}") from None
        if not isinstance(fields, dict):
            raise SnapshotError(f"{path}: is not a snapshot's manifest")
        if fields.get("format") == 1:  # from earlier versions; the oldest do not list connections
            fields = {"connections": [], "files": {}, "eager": "", "digest": "", **fields}
        elif fields.get("format") == _WITHOUT_BLOCKS:
            fields = {"eager": "", **fields}
        elif fields.get("format") != FORMAT:
            raise SnapshotError(f"{path}: format {str(fields.get('format'))[:40]} is not known to this version")
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            odd = ", ".join(sorted(set(fields) ^ known))
            raise SnapshotError(f"{path}: is not a snapshot's manifest: {odd}"[:300])
        for name, value in fields.items():
            if not _is_shaped(name, value):
                raise SnapshotError(f"{path}: {name}: is malformed")
        manifest = cls(**fields)
        if manifest.format > 1 and manifest.digest != manifest._digest():
            raise SnapshotError(f"{path}: is damaged: its digest does not match its fields")
        if not manifest.images or (manifest.format > 1 and set(manifest.files) != {CONFIG, LOG}):
            raise SnapshotError(f"{path}: does not name all files of a snapshot")
        return manifest


def _is_shaped(name: str, value: Any) -> bool:
    match name:
        case "format":
            return type(value) is int
        case "stdio" | "connections":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "annotations":
            return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        case "images" | "files":
            return isinstance(value, dict) and all(_is_entry(*item) for item in value.items())
    return isinstance(value, str)


def _is_entry(name: str, entry: Any) -> bool:
    if not name or "/" in name or "\0" in name or name.startswith(".") or not isinstance(entry, list):
        return False
    return [type(part) for part in entry] == [int, str]


def entry(file: BufferedReader) -> list[Any]:
    """Return the size and SHA-256 of an open file, read from its position to its end."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [file.tell(), digest]


class Snapshot:
    """An open snapshot directory that no other user can change. A context manager."""

    def __init__(self, path: Path, fd: int, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._fd = fd

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open a snapshot directory. Raises SnapshotNotFound, SnapshotError."""
        path = Path(os.path.realpath(directory))
        fd = -1
        try:
            fd = trusted.open_directory(str(path))
            with open(trusted.open_file(MANIFEST, fd), "rb") as file:
                data = file.read(_LARGEST)
            return cls(path, fd, Manifest.parse(data, path / MANIFEST))
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise SnapshotNotFound(f"{directory} is not a snapshot: it has no manifest.json") from None
            if isinstance(error, OSError):
                raise refusal(path / MANIFEST if fd >= 0 else path, error) from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def warnings(self) -> list[str]:
        """Sentences that a user should read before the snapshot is used."""
        found = [_WEAK] if self.manifest.format == 1 else []
        if os.fstat(self._fd).st_mode & 0o055:
            found.append("other users can read the container's memory in it (chmod 700)")
        return found

    @property
    def has_blocks(self) -> bool:
        """Whether each block of its pages can be verified for itself."""
        return self.manifest.format > _WITHOUT_BLOCKS

    def verify(self, pages: bool = True) -> None:
        """Compare every file with the manifest. Raises SnapshotError naming the first that differs or is not listed.

        Without `pages` the images that hold pages are left to `verify_pages`.
        """
        known = {MANIFEST, CONFIG, LOG, IMAGES} | ({page_digests.NAME} if self.has_blocks else set())
        with self.listed(IMAGES) as (fd, names):
            for name in sorted(names - set(self.manifest.images)):
                raise SnapshotError(f"{self.path / IMAGES / name}: is not in the manifest")
            for name, listed in self.manifest.images.items():
                if not (self.has_blocks and is_pages(name)):
                    self._compare(name, fd, listed, self.path / IMAGES / name)
        for name in sorted(set(os.listdir(self._fd)) - known):
            raise SnapshotError(f"{self.path / name}: is not in the manifest")
        for name in (CONFIG, LOG):
            if self.manifest.files or name in os.listdir(self._fd):
                self._compare(name, self._fd, self.manifest.files.get(name), self.path / name)
        if pages and self.has_blocks:
            self.verify_pages({})

    def verify_pages(self, some: Mapping[str, Iterable[int]]) -> PageDigests:
        """Compare the images that hold pages with their digests, and return those; `verify` the others before.

        Of an image in `some` compare only these blocks. Raises SnapshotError.
        """
        path = self.path / page_digests.NAME
        try:
            digests = PageDigests.load(self._fd, self.path, self.manifest.images)
            with self.listed(IMAGES) as (fd, _):
                for name in digests.parts:
                    path = self.path / IMAGES / name
                    digests.compare(name, fd, self.manifest.images[name][0], path, some.get(name))
        except OSError as error:
            raise refusal(path, error) from None
        return digests

    def _compare(self, name: str, directory: int, listed: list[Any] | None, path: Path) -> None:
        try:
            with open(trusted.open_file(name, directory), "rb") as file:
                found = entry(file) if listed is not None else None
        except OSError as error:
            raise refusal(path, error) from None
        if found is not None and found != listed:
            assert listed is not None
            words = f"{found[0]} bytes; SHA-256 {found[1][:12]}..., not {listed[1][:12]}..."
            raise SnapshotError(f"{path}: is damaged ({words})")

    @contextmanager
    def listed(self, name: str) -> Iterator[tuple[int, set[str]]]:
        """Yield a descriptor of a directory in the snapshot, and the names in it."""
        try:
            fd = trusted.open_directory(str(self.path / name))
        except OSError as error:
            raise refusal(self.path / name, error) from None
        try:
            yield fd, set(os.listdir(fd))
        finally:
            os.close(fd)

    def copy_log(self, destination: Path) -> None:
        """Copy the container's log to a new file."""
        try:
            source = trusted.open_file(LOG, self._fd)
        except FileNotFoundError:
            return
        with open(source, "rb") as file, open(destination, "wb") as out:
            os.fchmod(out.fileno(), 0o600)
            while data := file.read(1 << 20):
                out.write(data)


_COPY = "copy it to a directory that belongs to root (cp -R), and check it with `pymigrate snapshot show`"


def refusal(path: Path, error: OSError, remedy: str = _COPY) -> SnapshotError:
    """Return the error for an unusable file or directory of a snapshot; `remedy`: if another user can change it."""
    if error.errno == errno.EPERM and error.filename:
        place = error.filename if os.path.isabs(error.filename) else path
        text = f"{place}: {error.strerror}: a snapshot must be where no other user can change it"
        return SnapshotError(text, remedy=remedy)
    words = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
    return SnapshotError(f"{path}: {words}")
