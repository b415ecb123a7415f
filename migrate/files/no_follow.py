"""Starts rsync so that it follows no link in the tree that it reads.

A container that runs can put a link to anything in the place of a directory between two looks of rsync's, and would
have the host's files sent as its own. In a mount namespace of rsync's own, the tree is mounted over itself so that the
kernel refuses that.

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
