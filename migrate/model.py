"""What a user asks for when a container is to be moved."""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from migrate.errors import ProtocolError

FREEZE_TIMEOUT = 120.0  # seconds that a container is frozen at most, where nothing else is said
MAX_FREEZE_TIMEOUT = 86400.0
_MIGRATION_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{16}")


def check_migration_id(value: str) -> str:
    """Return a migration id that came from outside. Raises ProtocolError."""
    if _MIGRATION_ID.fullmatch(value) is None:
        raise ProtocolError(f"invalid migration id {value!r}")
    return value


class MigrationMode(enum.StrEnum):
    """How memory gets across. More modes come with pre-copy and post-copy."""

    STOP_AND_COPY = "stop-and-copy"


@dataclass(frozen=True)
class MigrationSpec:
    """One move: container `id` to `host` ([USER@]NAME as ssh knows it).

    `allow` lifts rules of validate; `timeout` bounds the time, in seconds, that the container may be frozen before
    the move is given up and the container goes on at the source. `net` is what --net says: "bridge=NAME", the bridge
    that the container's network is on at the target. With `tcp_close` the container finds its TCP connections closed.
    `volumes` says of bind mounts, by destination, what becomes of them (volumes.parse).
    """

    id: str
    host: str
    allow: frozenset[str] = frozenset()
    mode: MigrationMode = MigrationMode.STOP_AND_COPY
    timeout: float = FREEZE_TIMEOUT
    net: str | None = None
    tcp_close: bool = False
    volumes: Mapping[str, str] = field(default_factory=dict)
