"""Keep CRIU's `tar --gzip` of a tmpfs from compressing, because the container is frozen meanwhile.

CRIU runs the first `tar` on its PATH. The one made here runs the next one without `--gzip`, which also saves tar three
processes (2 of 4 ms). CRIU's image is then a plain archive. It is sent as a gzip file that is not compressed, which any
gzip at the target reads.
"""

import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from migrate.disk import write_atomically
from migrate.paths import TAR as DIRECTORY
from runtime.linux import trusted

_TAR = b"""#!/bin/sh
for word do
    shift
    [ "$word" = --gzip ] || set -- "$@" "$word"
done
PATH=${PATH#*:}
exec tar "$@"
"""
_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20


def environment() -> dict[str, str]:
    """Return an environment for CRIU in which tar does not compress, or the usual one if that cannot be made."""
    program = DIRECTORY / "tar"
    try:
        os.close(trusted.make_directory(str(DIRECTORY), 0o755))
        if not program.exists():
            write_atomically(program, _TAR)
            program.chmod(0o755)
        with open(trusted.open_file(str(program)), "rb") as file:
            if file.read(len(_TAR) + 1) != _TAR:
                return dict(os.environ)
    except OSError:
        return dict(os.environ)
    return {**os.environ, "PATH": f"{DIRECTORY}:{os.environ.get('PATH') or os.defpath}"}


def contents(name: str, file: BinaryIO) -> Iterator[bytes]:
    """Yield an image as it is sent: unchanged, except that an uncompressed archive of a tmpfs becomes a gzip file."""
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
