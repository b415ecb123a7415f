"""The tmpfs mounts of a move that is in doubt, as files beside its images: memory alone does not outlive a power cut.

    pymigrate-tmpfs.img      JSON: {NUMBER: {"source": ..., "options": ...}} of each mount (target/tmpfs.py)
    pymigrate-tmpfs-N.img    what is in it, its root included, as a tar archive

Sockets are not in it: CRIU makes those that are bound.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from criu_rpc import tar
from migrate.errors import TargetError
from migrate.files import mountinfo
from migrate.files.trees import is_tmpfs_option
from migrate.target import image_manifest
from migrate.target import tmpfs as target_tmpfs
from runtime.linux import syscalls

INDEX = "pymigrate-tmpfs.img"
_CHUNK = 1 << 20
_PACK = ("tar", "--create", "--sparse", "--numeric-owner", "--atime-preserve=system", "--one-file-system", "--file=-")
_UNPACK = ("tar", "--extract", "--preserve-permissions", "--same-owner", "--numeric-owner", "--file=-")


def pack(migration: str, directory: Path) -> dict[str, tuple[int, str]]:
    """Write the files for all mounts of a move into a directory, synced: name -> (size, SHA-256). {} without mounts.

    Raises TargetError, OSError.
    """
    below = target_tmpfs.DIRECTORY / migration
    mounts = [mount for mount in mountinfo.read() if Path(mount.place).parent == below]
    _remove(directory)  # what a keeper has left that was killed
    made: dict[str, tuple[int, str]] = {}
    index = {}
    try:
        for mount in mounts:
            number = os.path.basename(mount.place)
            name = f"pymigrate-tmpfs-{number}.img"
            made[name] = image_manifest.write(directory / name, _packed(mount.place))
            options = ",".join(option for option in mount.options.split(",") if is_tmpfs_option(option))
            index[number] = {"source": mount.source, "options": options}
        if index:
            made[INDEX] = image_manifest.write(directory / INDEX, [json.dumps(index).encode()])
    except BaseException:
        _remove(directory)
        raise
    return made


def _remove(directory: Path) -> None:
    for path in directory.glob("pymigrate-tmpfs*.img"):
        path.unlink()


def _packed(place: str) -> Iterator[bytes]:
    """The archive of a mount, piece by piece. Raises TargetError, OSError."""
    argv, null = [*_PACK, f"--directory={place}", "."], subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=null, stdout=subprocess.PIPE, stderr=null, env=tar.environment()) as packing:
        assert packing.stdout is not None
        while data := packing.stdout.read(_CHUNK):
            yield data
    if packing.returncode:
        raise TargetError(f"{place}: tar failed with exit status {packing.returncode}")


def unpack(migration: str, directory: Path) -> None:
    """Make those mounts of a move again that are gone, from images that have been verified.

    Raises TargetError.
    """
    try:
        index = json.loads((directory / INDEX).read_bytes())
        mounts = {str(int(number)): (str(item["source"]), str(item["options"])) for number, item in index.items()}
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TargetError(f"{directory / INDEX}: cannot be read: {error}") from None
    for number, (source, options) in mounts.items():
        place = target_tmpfs.DIRECTORY / migration / number
        if os.path.ismount(place):
            continue
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            final = target_tmpfs.mount(source, str(place), options)
            with open(directory / f"pymigrate-tmpfs-{number}.img", "rb") as archive:
                argv, null = [*_UNPACK, f"--directory={place}"], subprocess.DEVNULL
                subprocess.run(argv, stdin=archive, stdout=null, stderr=null, env=tar.environment(), check=True)
            if final:
                target_tmpfs.narrow({str(place): options})
        except (OSError, subprocess.CalledProcessError) as error:
            with contextlib.suppress(OSError):
                syscalls.umount(place, syscalls.MNT_DETACH)
            raise TargetError(f"a tmpfs of the container cannot be made again: {error}") from None
