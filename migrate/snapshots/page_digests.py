"""The file `digests` of a snapshot: the digest of each block of its pages images (memory/block_digests.py).

It has the digests of one image after the other, in the order of their names. The manifest has the SHA-256 of each
image's part of it in place of that of the image. So a block can be verified without the rest of the image.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from migrate.errors import SnapshotError
from migrate.memory import block_digests
from migrate.memory.image_source import damaged, is_pages
from migrate.memory.layout import BLOCK
from runtime.linux import trusted

NAME = "digests"
_LARGEST = 256 << 20  # bytes: those of 2 TiB of memory


class PageDigests:
    """The digests of all pages images: `parts` maps an image to those of its blocks."""

    def __init__(self, parts: dict[str, bytes]) -> None:
        self.parts = parts

    @classmethod
    def load(cls, directory: int, place: Path, images: Mapping[str, list[Any]]) -> Self:
        """Read those of a snapshot whose manifest lists these images. Raises SnapshotError, OSError."""
        sizes = {name: images[name][0] for name in sorted(filter(is_pages, images))}
        expected = sum(block_digests.count(size) * block_digests.SIZE for size in sizes.values())
        with open(trusted.open_file(NAME, directory), "rb") as file:
            if os.fstat(file.fileno()).st_size != expected or expected > _LARGEST or min(sizes.values(), default=0) < 0:
                raise SnapshotError(f"{place / NAME}: is damaged: it does not have the digests of all pages")
            data = file.read(expected)
        parts, at = {}, 0
        for name, size in sizes.items():
            end = at + block_digests.count(size) * block_digests.SIZE
            parts[name], at = data[at:end], end
            if _digest(parts[name]) != images[name][1]:
                raise SnapshotError(f"{place / NAME}: is damaged: the digests of {name} are not those in the manifest")
        return cls(parts)

    def all(self) -> bytes:
        """Return the contents of the file."""
        return b"".join(part for _, part in sorted(self.parts.items()))

    def add(self, name: str, path: Path) -> list[Any]:
        """Read a new pages image; return its entry for the manifest. Raises OSError."""
        with path.open("rb") as file:
            self.parts[name] = b"".join(block_digests.read(file))
            return [file.tell(), _digest(self.parts[name])]

    def compare(self, name: str, directory: int, size: int, path: Path, blocks: Iterable[int] | None) -> None:
        """Compare an image with its digests, or only some of its blocks. Raises SnapshotError, OSError.

        `directory` is the descriptor of that of the images, `path` is the image's for messages.
        """
        digests = self.parts[name]
        with open(trusted.open_file(name, directory), "rb") as file:
            found_size = os.fstat(file.fileno()).st_size
            if found_size != size:
                raise SnapshotError(f"{path}: is damaged ({found_size} bytes, not {size})")
            for number, found in _found(file, blocks):
                if found != digests[number * block_digests.SIZE : (number + 1) * block_digests.SIZE]:
                    raise SnapshotError(damaged(str(path), number * BLOCK, min(BLOCK, size - number * BLOCK)))


def _found(file: BufferedReader, blocks: Iterable[int] | None) -> Iterator[tuple[int, bytes]]:
    if blocks is None:
        yield from enumerate(block_digests.read(file))
        return
    for number in sorted(blocks):
        file.seek(number * BLOCK)
        yield number, block_digests.one(file.read(BLOCK))


def _digest(digests: bytes) -> str:
    return hashlib.sha256(digests).hexdigest()
