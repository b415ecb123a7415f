"""Memory that a device writes: reads of files that are open with O_DIRECT.

The pages count as written when the read begins, and change when the device is done, which no tracker sees. If they are
read in between, and nobody writes them later, the target gets what was there before. So a process that has such files
open must stand still while its pages are marked as not written: a thread does not stop while it waits for its read.
Asynchronous reads (io_submit(2)) go on when all threads stand still.
"""

import contextlib
import os


def is_used(pid: int) -> bool:
    """Return whether a process has a file open with O_DIRECT. Raises OSError when it has exited."""
    place = f"/proc/{pid}/fdinfo"
    for name in os.listdir(place):
        with contextlib.suppress(FileNotFoundError):  # it was closed
            with open(f"{place}/{name}", "rb", buffering=0) as file:
                lines = file.read(256).split(b"\n", 2)
            if int(lines[1].split()[1], 8) & os.O_DIRECT:
                return True
    return False


def is_asynchronous(pid: int) -> bool:
    """Return whether a process can read such files asynchronously. Raises OSError when it has exited."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        return b" /[aio]" in maps.read() and is_used(pid)
