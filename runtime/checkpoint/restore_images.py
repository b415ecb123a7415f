"""The directory of CRIU's images, opened so that the root of a container's user namespace can read it too.

Half of CRIU runs inside the user namespace, and other users cannot read the files that root has written. CRIU therefore
gets a mount that shows the files as that root's own. Before the ids are mapped, CRIU is nobody, but a member of root's
group.
"""

from __future__ import annotations

import os

from runtime.errors import ContainerError
from runtime.init import idmaps
from runtime.linux import syscalls
from runtime.linux.mount_flags import ATTR_IDMAP
from runtime.spec.mounts import IdMapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.spec.config import Spec


def open_directory(images: str, spec: Spec, *, may_give: bool) -> int:
    """Return a descriptor of the directory `images`.

    A file system that cannot map ids needs files of another owner; `may_give` allows that, for images that were made
    for this restore. Raises ContainerError.
    """
    if not spec.uid_mappings:
        return os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    tree = syscalls.open_tree(images, recursive=False)
    os.chmod(images, 0o750)
    for path in _files(images):
        os.chmod(path, 0o640)
    userns = idmaps.namespace(spec.uid_mappings, (IdMapping(0, 0, 2**32 - 1),))
    try:
        syscalls.mount_setattr(tree, set=ATTR_IDMAP, clear=0, recursive=False, userns_fd=userns)
    except OSError as error:
        os.close(tree)
        root = next((mapping.host for mapping in spec.uid_mappings if mapping.container == 0), None)
        if not may_give or root is None:
            raise ContainerError(
                f"{images}: the file system cannot map ids, which a user namespace needs: {error.strerror}"
            ) from None
        return _give(images, root)
    finally:
        os.close(userns)
    return tree


def _give(images: str, uid: int) -> int:
    """Make the files themselves that root's, because tmpfs maps no ids before Linux 6.3.

    Other users still cannot reach the files: the directory above the images admits only root.
    """
    for path in _files(images):
        os.chown(path, uid, 0, follow_symlinks=False)
    os.chown(images, uid, 0)
    return os.open(images, os.O_RDONLY | os.O_DIRECTORY)


def _files(images: str) -> list[str]:
    return [
        entry.path
        for entry in os.scandir(images)
        if entry.name.endswith(".img") and entry.is_file(follow_symlinks=False)
    ]
