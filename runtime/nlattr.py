"""The attributes of a netlink(7) message, as they come from the kernel."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NESTED = 0x8000


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and value of each; what is malformed ends them."""
    while len(data) >= 4:
        length, number = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield number & ~NESTED, data[4:length]
        data = data[(length + 3) & ~3 :]
