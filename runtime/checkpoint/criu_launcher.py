"""The last steps before a restore: become `criu swrk` in the container's cgroup, with its root file system in place.

CRIU is told to ignore cgroups, so the restored processes stay in CRIU's own: this process joins the container's cgroup
and makes the cgroup namespace there, whose root is then the container's cgroup, as before. It also binds the rootfs
onto itself, because CRIU needs a mount point, in a private mount namespace that vanishes with CRIU.

Runs under `python3 -I -S` as a child of the monitor, so that the restored init becomes the monitor's child.
"""

import os
import sys

from criu_rpc import tar
from runtime.linux import syscalls
from runtime.linux.mount_flags import MS_BIND, MS_PRIVATE, MS_REC


def main(argv: list[str]) -> int:
    """argv: ROOTFS, "cgroupns" or "", KEYRING, cgroup directories, "--", the program to become and its arguments."""
    split = argv.index("--")
    rootfs, cgroupns, keyring, *cgroups = argv[:split]
    try:
        os.setgroups([])  # CRIU 3.17 gives its own groups to a process that had none
        for directory in cgroups:
            with open(os.path.join(directory, "cgroup.procs"), "w") as procs:
                procs.write("0")
        # Restored processes have CRIU's session keyring, which must not be that of the user who has logged in here.
        syscalls.join_session_keyring(keyring)
        syscalls.unshare(syscalls.CLONE_NEWNS | (syscalls.CLONE_NEWCGROUP if cgroupns else 0))
        syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)
        syscalls.mount(rootfs, rootfs, None, MS_BIND | MS_REC)
        os.chdir("/")
        os.execve(argv[split + 1], argv[split + 1 :], tar.environment())
    except OSError as error:
        print(f"cannot prepare the restore: {error}", file=sys.stderr)
    return 1
