"""What can go wrong with one container.

ContainerError (failure)
+-- InvalidId (invalid)         an id that cannot be a directory's name
+-- SpecError (invalid)         config.json: names the file and the field
+-- NotSupported (invalid)      config.json asks for what this version or kernel cannot do
+-- NotFound (not-found)        no such container
+-- Conflict (conflict)         the id is in use, or the status does not allow it
+-- StateError (invalid)        a state.json that cannot be read
+-- StartFailed (failure)       the container's init or an exec'ed process could not be set up
+-- DeadlineExceeded (deadline)
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class ContainerError(Exception):
    """Base of all errors of this package. The message is one lower-case sentence; `remedy` says what to do."""

    kind = "failure"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


def unwritable(path: str, error: OSError) -> ContainerError:
    """The error of a file of ours that cannot be written."""
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


class DeadlineExceeded(ContainerError):
    kind = "deadline"
