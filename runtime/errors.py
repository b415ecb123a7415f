"""What can go wrong with one container. criu_rpc/errors.py draws the tree of all errors."""

from __future__ import annotations

import errno
import os

from criu_rpc.errors import DeadlineExceeded as DeadlineExceeded
from criu_rpc.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class ContainerError(Error):
    """Base of the errors of this package."""


def unwritable(path: str, error: OSError) -> ContainerError:
    """Return the error of a file of pymigrate's that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = f"make room where {os.path.dirname(path)} is" if full else None
    return ContainerError(f"{path}: cannot be written: {error.strerror}", remedy=remedy)


class InvalidId(ContainerError):
    kind = "invalid"


class SpecError(ContainerError):
    kind = "invalid"


class NotSupported(SpecError):
    pass


class NotFound(ContainerError):
    kind = "not-found"

    @classmethod
    def of(cls, container_id: str) -> Self:
        remedy = "`pymigrate list` shows those of this host, `pymigrate migrations` those that have moved"
        return cls(f"container does not exist: {container_id}", remedy=remedy)


class Conflict(ContainerError):
    kind = "conflict"


class StateError(ContainerError):
    kind = "invalid"


class StartFailed(ContainerError):
    pass
