"""The description of a move, as the user asks for it."""

import enum
import re
from collections.abc import Mapping

from migrate.errors import ProtocolError
from runtime.light.records import Record

FREEZE_TIMEOUT = 120.0  # default limit, in seconds, for the time that a container is frozen
MAX_FREEZE_TIMEOUT = 86400.0
_MIGRATION_ID = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{16}")


def check_migration_id(value: str) -> str:
    """Return `value` if it is a valid migration id. Raises ProtocolError."""
    if _MIGRATION_ID.fullmatch(value) is None:
        raise ProtocolError(f"invalid migration id {value!r}")
    return value


MAX_DOWNTIME = 0.3  # default limit, in seconds, for the gap that rounds of memory aim at
MAX_ROUNDS = 30
MAX_STREAMS = 16  # connections that carry memory


class MigrationMode(enum.StrEnum):
    """How memory is transferred."""

    AUTO = "auto"  # pre-copy where it is possible
    STOP_AND_COPY = "stop-and-copy"  # all of it while the container is frozen
    PRE_COPY = "pre-copy"  # in rounds while the container runs, and what is left while it is frozen


class OnDivergence(enum.StrEnum):
    """What to do with a program that writes its memory faster than it can be sent."""

    SWITCH_OVER = "switch-over"  # freeze it anyway
    THROTTLE = "throttle"  # give it less processor time, in steps, until it writes slowly enough
    ABORT = "abort"


class Compression(enum.StrEnum):
    """Whether memory is compressed on its way."""

    AUTO = "auto"  # where that saves time
    ZSTD = "zstd"
    NONE = "none"


class MigrationSpec(Record):
    """One move: container `id` to `host` ([USER@]NAME as ssh knows it).

    `allow`: rules of validate that are lifted. `timeout`: the longest time, in seconds, that the container may be
    frozen; after it the move is rolled back and the container resumes at the source. `max_downtime`: seconds that the
    rounds of memory aim at, `max_rounds` of them at most. `net`: the value of --net, "bridge=NAME", the bridge at the
    target. `tcp_close`: close the container's TCP connections. `compress` is about memory. `bandwidth_limit`: bytes per
    second while the container runs. `streams`: connections that carry memory. `volumes`: what to do with each bind
    mount, by its destination (preflight.volumes.parse).
    """

    id: str
    host: str
    allow: frozenset[str] = frozenset()
    mode: MigrationMode = MigrationMode.AUTO
    max_downtime: float = MAX_DOWNTIME
    max_rounds: int = MAX_ROUNDS
    on_divergence: OnDivergence = OnDivergence.SWITCH_OVER
    timeout: float = FREEZE_TIMEOUT
    net: str | None = None
    tcp_close: bool = False
    compress: Compression = Compression.AUTO
    bandwidth_limit: int | None = None
    streams: int = 1
    volumes: Mapping[str, str] = {}
