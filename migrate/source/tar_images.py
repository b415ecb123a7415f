"""CRIU packs what lies in a tmpfs with `tar --gzip` while the container is frozen: for a move, without gzip's work.

tar runs the `gzip` that is first on its PATH; ours hands on what it gets. What CRIU then has is a plain archive, and
goes over the connection in a gzip file that is not compressed: any gzip at the target reads that.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from migrate.disk import write_atomically
from runtime.linux import trusted

DIRECTORY = Path("/run/pymigrate-tar")  # not below /run/pymigrate: the root of a user namespace runs it, too
_GZIP = b"#!/bin/sh\nexec cat\n"
_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20


def environment() -> dict[str, str]:
    """An environment for CRIU in which tar does not compress. Where ours cannot be made or run, it does."""
    program = DIRECTORY / "gzip"
    try:
        os.close(trusted.make_directory(str(DIRECTORY), 0o755))
        if not program.exists():
            write_atomically(program, _GZIP)
            program.chmod(0o755)
        with open(trusted.open_file(str(program)), "rb") as file:
            if file.read(len(_GZIP) + 1) != _GZIP:
                return dict(os.environ)
    except OSError:
        return dict(os.environ)
    return {**os.environ, "PATH": f"{DIRECTORY}:{os.environ.get('PATH') or os.defpath}"}


def contents(name: str, file: BinaryIO) -> Iterator[bytes]:
    """An image as it is sent: as it is, but for an archive of a tmpfs that is not compressed yet."""
    file.seek(0)
    wrapped = None
    if name.startswith("tmpfs-"):
        wrapped = zlib.compressobj(0, zlib.DEFLATED, 16 + zlib.MAX_WBITS) if file.read(2) != _MAGIC else None
        file.seek(0)
    while data := file.read(_CHUNK):
        if wrapped is not None:
            data = wrapped.compress(data)
        yield data
    if wrapped is not None:
        yield wrapped.flush()
