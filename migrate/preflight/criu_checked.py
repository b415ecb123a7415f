"""Remember that CRIU works on this host. Asking it takes 40 ms of every move, twice; the answer lasts until a restart.

It is asked again when its binary, the kernel or this process's capabilities are others, when CRIU has forgotten what it
knows about the kernel (criu.kdat), and as long as it does not work.
"""

import contextlib
import json
import os
import platform
from pathlib import Path

from criu_rpc.client import Criu
from migrate.paths import CRIU_CHECKED
from runtime.linux import files, processes, trusted
from runtime.linux.capabilities import permitted

_KERNEL_DATA = Path("/run/criu.kdat")


def checked_version(criu: Criu, images_dir_fd: int, place: Path = CRIU_CHECKED) -> str:
    """Return the version of a CRIU that works on this host. Raises CriuError, DeadlineExceeded if it does not."""
    stamp = _stamp(criu.path)
    with contextlib.suppress(OSError, ValueError, TypeError):
        os.close(trusted.make_directory(str(place.parent)))
        with open(trusted.open_file(str(place)), "rb") as file:
            of, version = json.load(file)
        if of == stamp and isinstance(version, str):
            return version
    version = str(criu.version())
    criu.check(images_dir_fd)
    stamp = _stamp(criu.path)  # now CRIU knows the kernel
    with contextlib.suppress(OSError):
        files.replace(str(place), json.dumps([stamp, version]).encode())
    return version


def _stamp(path: str) -> list[object]:
    info = os.stat(path)
    binary = [os.path.realpath(path), info.st_ino, info.st_size, info.st_mtime_ns]
    return [*binary, platform.release(), processes.boot_id(), permitted(), _KERNEL_DATA.exists()]
