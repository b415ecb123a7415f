"""The description of a move, as the user asks for it."""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from migrate.errors import ProtocolError

FREEZE_TIMEOUT = 120.0  # default limit, in seconds, for the time that a container is frozen
MAX_FREEZE_TIMEOUT = 86400.0
_MIGRATION_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{16}")


def check_migration_id(value: str) -> str:
    """Return `value` if it is a valid migration id. Raises ProtocolError."""
    if _MIGRATION_ID.fullmatch(value) is None:
        raise ProtocolError(f"invalid migration id {value!r}")
    return value


class MigrationMode(enum.StrEnum):
    """How memory is transferred. More modes come with pre-copy and post-copy."""

    STOP_AND_COPY = "stop-and-copy"


@dataclass(frozen=True)
class MigrationSpec:
    """One move: container `id` to `host` ([USER@]NAME as ssh knows it).

    `allow`: rules of validate that are lifted. `timeout`: the longest time, in seconds, that the container may be
    frozen; after it the move is rolled back and the container resumes at the source. `net`: the value of --net,
    "bridge=NAME", the bridge at the target. `tcp_close`: close the container's TCP connections. `volumes`: what to do
    with each bind mount, by its destination (preflight.volumes.parse).
    """

    id: str
    host: str
    allow: frozenset[str] = frozenset()
    mode: MigrationMode = MigrationMode.STOP_AND_COPY
    timeout: float = FREEZE_TIMEOUT
    net: str | None = None
    tcp_close: bool = False
    volumes: Mapping[str, str] = field(default_factory=dict)
