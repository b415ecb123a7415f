"""Digests of the blocks of a file: SHA-256 of each BLOCK bytes, the last of which may be fewer.

One digest of a whole file would have to be computed before the first byte can be trusted, which takes a second for each
GiB. SHA-256, because processors have instructions for it; it is not truncated, because 32 bytes of 256 KiB are little.
"""

import hashlib
from collections.abc import Iterator
from io import BufferedReader

from migrate.memory.layout import BLOCK

SIZE = 32


def count(size: int) -> int:
    """Return the number of blocks of a file of `size` bytes."""
    return -(-size // BLOCK)


def one(block: bytes | memoryview) -> bytes:
    """Return the digest of a block."""
    return hashlib.sha256(block).digest()


def read(file: BufferedReader) -> Iterator[bytes]:
    """Yield the digest of each block of an open file, from its position to its end. Raises OSError."""
    buffer = memoryview(bytearray(BLOCK))
    while size := _fill(file, buffer):
        yield one(buffer[:size])


def _fill(file: BufferedReader, buffer: memoryview) -> int:
    size = 0
    while size < len(buffer) and (got := file.readinto(buffer[size:])):
        size += got
    return size
