"""Open tmpfs mounts of a container for the calling process, read-only and without following links in them.

argv: PID SOCKET PLACE...; the descriptors go over the inherited socket, in the order of the places.
"""

import array  # noqa: F401  socket.send_fds imports it when imports are forbidden already
import os
import socket
import sys

from runtime.linux import selfexec, syscalls
from runtime.linux.mount_flags import ATTR_NOSYMFOLLOW, ATTR_RDONLY


def main(argv: list[str]) -> int:
    pid, number, *places = argv
    ours = socket.socket(fileno=int(number))
    try:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        found = [syscalls.open_in_root(root, place, os.O_PATH | os.O_DIRECTORY) for place in places]
        selfexec.forbid_imports()
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)  # its mounts can be copied only from inside
        views = [syscalls.open_tree("", dir_fd=fd, recursive=False) for fd in found]
        for view in views:
            syscalls.mount_setattr(view, set=ATTR_RDONLY | ATTR_NOSYMFOLLOW, clear=0, recursive=False)
        socket.send_fds(ours, [b"\0"], views)
    except OSError as error:
        os.write(sys.stderr.fileno(), str(error).encode())
        return 1
    return 0
