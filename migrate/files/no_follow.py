"""Start rsync so that it follows no link in the tree that it reads.

A running container can replace a directory by a link to anything between two accesses of rsync, and would have the
host's files sent as its own. In a separate mount namespace the tree is mounted over itself with a flag that makes the
kernel reject links.

argv: TREE PROGRAM ARGUMENT...
"""

import os

from runtime.linux import syscalls
from runtime.linux.mount_flags import ATTR_NOSYMFOLLOW, MS_PRIVATE, MS_REC


def main(argv: list[str]) -> int:
    tree, *command = argv
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)
    copy = syscalls.open_tree(tree, recursive=True)
    syscalls.mount_setattr(copy, set=ATTR_NOSYMFOLLOW, clear=0, recursive=True)
    syscalls.move_mount(copy, os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    os.execv(command[0], command)
