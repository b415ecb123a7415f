"""CRIU's image files in protobuf's wire format: read them, take messages apart, write them.

An image file is 8 bytes of magic numbers, then entries: a length (4 bytes, little endian) and a message. Why this is
not done with generated messages: see image_codec.py.
"""

import os
from collections.abc import Iterator, Sequence

from criu_rpc.errors import CriuError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Field = tuple[int, int, int | bytes]  # number, wire type, value


def value(fields: list[Field], number: int) -> int:
    """Return a number among the fields of a message, 0 without one."""
    return next((value for n, _, value in fields if n == number and isinstance(value, int)), 0)


def value_bytes(fields: list[Field], number: int) -> bytes:
    """Return bytes among the fields of a message, b"" without them."""
    return next((value for n, _, value in fields if n == number and isinstance(value, bytes)), b"")


def entries(data: bytes, at: int = 8) -> Iterator[bytes]:
    """Yield the messages of an image file, which begin `at` its magic numbers' end."""
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def fields(data: bytes) -> list[Field]:
    """Return the fields of a message in order: number, wire type, value."""
    found: list[Field] = []
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = varint(data, at)
            found.append((number, kind, value))
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
        if kind == BYTES:
            size, at = varint(data, at)
        elif not size:
            raise CriuError("an image file of CRIU has an invalid protobuf message")
        found.append((number, kind, data[at : at + size]))
        at += size
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and where it ends. Raises CriuError."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise CriuError("an image file of CRIU is truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def encode(fields: Sequence[Field]) -> bytes:
    """Return a message with these fields."""
    out = bytearray()
    for number, kind, value in fields:
        out += _varint_bytes(number << 3 | kind)
        if isinstance(value, int):
            out += _varint_bytes(value)
        else:
            out += (_varint_bytes(len(value)) if kind == BYTES else b"") + value
    return bytes(out)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read(directory: int, name: str) -> bytes:
    """Return an image file in the directory behind a descriptor. Raises OSError."""
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
        return file.read()


def write(directory: int, name: str, head: bytes, entries: list[bytes]) -> None:
    """Replace an image file: its magic numbers `head`, and messages. Raises OSError."""
    new = f"{name}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o600, dir_fd=directory), "wb") as file:
        file.write(head + b"".join(len(entry).to_bytes(4, "little") + entry for entry in entries))
    os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
