"""The target's half of tmpfs mounts that are carried as trees: one tmpfs for each, until the container has it.

They are mounted below /var/lib/pymigrate/tmpfs/<migration>, so that they outlive the agent as images do.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from migrate.errors import TargetError
from migrate.files.trees import Mounted
from migrate.paths import TMPFS
from runtime.linux import syscalls
from runtime.linux.mount_flags import MS_REMOUNT, MS_STRICTATIME

DIRECTORY = TMPFS


def places(migration: str, mounted: list[Mounted]) -> dict[str, str]:
    """Return mount point in the container -> where its tmpfs is mounted here."""
    return {item.place: str(DIRECTORY / migration / str(number)) for number, item in enumerate(mounted)}


def make(migration: str, mounted: list[Mounted]) -> dict[str, str]:
    """Mount them, empty, with room for a second copy of what rsync replaces; from here on `remove` is needed.

    Returns what `narrow` is to be given. Raises TargetError, OSError.
    """
    limits = {}
    for item, path in zip(mounted, places(migration, mounted).values(), strict=True):
        os.makedirs(path, 0o700)
        try:
            # CRIU sets the other flags when it binds the mount; its images have none for this one.
            final = mount(item.source, path, item.options)
            space = os.statvfs(path)
            size, inodes = space.f_blocks * space.f_frsize, space.f_files
            limits[path] = f"size={size},nr_inodes={inodes}{final}"
            _remount(path, f"size={2 * size},nr_inodes={2 * inodes}")
        except OSError as error:
            raise TargetError(f"a tmpfs like that at {item.place} cannot be made here: {error}") from None
    return limits


def mount(source: str, path: str, options: str) -> str:
    """Mount a tmpfs, writable in any case; return ",ro" if it must not be in the end, else "". Raises OSError."""
    given = options.split(",")
    syscalls.mount(source, path, "tmpfs", MS_STRICTATIME, ",".join(option for option in given if option != "ro"))
    return ",ro" if "ro" in given else ""


def narrow(limits: dict[str, str]) -> None:
    """Limit them to what the container could do with them, because all has come. Raises OSError."""
    for path, options in limits.items():
        _remount(path, options)


def _remount(path: str, options: str) -> None:
    syscalls.mount(None, path, None, MS_REMOUNT | MS_STRICTATIME, options)


def check(paths: Iterable[str]) -> None:
    """Raise TargetError when one is no longer mounted."""
    for path in paths:
        if not os.path.ismount(path):
            raise TargetError(f"{path} is no longer mounted: this host was restarted, and its contents are lost")


def remove(migration: str) -> None:
    """Unmount them. What a container has bound of them stays. Harmless when there are none."""
    directory: Path = DIRECTORY / migration
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                syscalls.umount(directory / name, syscalls.MNT_DETACH)
            with contextlib.suppress(OSError):  # never its contents, should it still be mounted
                os.rmdir(directory / name)
    for path in (directory, DIRECTORY):
        with contextlib.suppress(OSError):
            os.rmdir(path)
