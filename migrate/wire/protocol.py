"""The conversation of the two ends of a move, without I/O: every call and every reply as a record (records.py).

A connection carries frames (frames.py), both ways: a type (1 byte), a length (4 bytes, big endian), and so many bytes.

    CALL     source -> target  JSON {"call": NAME, "args": {...}}: one of the calls below, nothing else
    REPLY    target -> source  JSON: the reply to the oldest unanswered call
    FAILURE  target -> source  JSON: a Failure instead of the reply
    PAGES    source -> target  the next bytes of CRIU's page-server stream (codec.py)
    DATA     source -> target  the next bytes of the image that the last Image named
    MEMORY   source -> target  a piece of the container's memory (codec.py)
    PULSE    target -> source  every few seconds, so that a dead connection shows at the target as well: a decimal
                               number that changes as long as a process there receives files

Order of a move: Hello, Facts, CheckPorts, CheckTrees, CheckFiles, OpenBundle, [rsync over channels of its own,
BundleSent for a rootfs, TreesSent for what may change and what comes beside], Prepare, [MemoryBegin, [MemoryStreams],
MEMORY... and MemorySync in rounds], PagesBegin, PAGES... [and MEMORY...], PagesEnd, (Image, DATA..., ImageEnd)*,
[MEMORY..., MemoryEnd], [rsync], Restore (prepared, held), Confirm (still held), Resume (resumed), History. Abort
at any point before Resume; a lost connection there means the same. Image and ImageEnd have no reply: their failure is
Restore's. `order.py` has all of this as a table.
A plan of a move asks the questions of one, then sends TrialBegin, MEMORY... and MemorySync, TrialEnd, and hangs up.

Versions: Hello carries the only number, and it stands for the shape of every call and every reply: CALLS lists the
calls of each version, and a call names its reply. One number suffices because a connection is between two versions
only, and because the first frame of each side settles it before any other is read. A version 3 that changes Prepare
adds a class for it, and a line `3: {**CALLS[2], "Prepare": NewPrepare}`; an agent that speaks both reads with the table
of the version that Hello has asked for. Hello and Welcome keep their fields for good, so that each version can read
those of any other and refuse them in one sentence.

Whatever comes in is bounded and checked here: types, lengths, names. `ProtocolError` is the other side's fault.
"""

import re
import typing
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from migrate.errors import MigrateError, ProtocolError
from migrate.files.trees import MAX_TREES, Mounted, Needed, Root, Tree
from migrate.model import FREEZE_TIMEOUT, MAX_FREEZE_TIMEOUT, MAX_STREAMS, check_migration_id
from migrate.wire import records
from migrate.wire.frames import MAX_CALL, MAX_IMAGE, MAX_TRIAL, FrameType, header
from migrate.wire.questions import MAX_FILES, MAX_PORTS, Bound, FactsQuery, HostFacts, Seen
from migrate.wire.records import Json, Most, Range
from migrate.wire.replies import (
    Done,
    Failure,
    FilesSeen,
    MemoryReady,
    Opened,
    PortsChecked,
    Prepared,
    Restored,
    Resumed,
    Settled,
    TreesChecked,
    Welcome,
)
from runtime.light.records import Record

VERSION = 2

_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}\.img")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WIRE_DIGEST = re.compile(r"[0-9a-f]{8}|[0-9a-f]{32}")
_MEMORY = 1 << 50
Size = Annotated[int, Range(0, 1 << 62)]
_FROZEN = Range(0, MAX_FREEZE_TIMEOUT)

Text = Annotated[str, Most(MAX_CALL)]  # as long as a call may be
Trees = Annotated[list[Tree], Most(MAX_TREES)]
Timeout = Annotated[float, _FROZEN]
Verdict = Literal["resume", "abort", "ask"]


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(what)


def _check_timeout(value: float) -> None:
    _check(0 < value <= MAX_FREEZE_TIMEOUT, f"a container cannot be frozen for {value!r} s")


def _check_digest(value: str) -> None:
    _check(_DIGEST.fullmatch(value) is not None, f"{value[:80]!r} is not a SHA-256")


def _check_wire_digest(value: str) -> None:
    _check(_WIRE_DIGEST.fullmatch(value) is not None, f"{value[:80]!r} is not a digest")


R = TypeVar("R")


class Call(Record, Generic[R]):
    """Something that the source wants of the target, which replies with a record of class `reply` (R)."""

    reply: ClassVar[type[Any] | None] = None  # None: it has no reply

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        (base,) = (base for base in getattr(cls, "__orig_bases__", ()) if typing.get_origin(base) is Call)
        (reply,) = typing.get_args(base)
        cls.reply = None if reply is type(None) else reply

    def check_reply(self, reply: R) -> None:
        """Raise ProtocolError unless `reply` fits this very call."""


class Hello(Call[Welcome]):
    """Which protocol the source speaks, and its directory of container states. The same in every version."""

    version: int
    root: str


class Facts(Call[HostFacts]):
    """Ask the target for its HostFacts."""

    query: FactsQuery


class Discard(Call[Done]):
    """The source has aborted these moves without being able to say so: the target removes what it has of them."""

    migrations: list[str]

    def __post_init__(self) -> None:
        for migration in self.migrations:
            check_migration_id(migration)


class OpenBundle(Call[Opened]):
    """`source` begins to move container `id`: where does its bundle lie at the target, and is its rootfs there?

    `config` is config.json as text, `fingerprint` that of the rootfs (files.fingerprint), "" for one that the container
    may write to; `hints` are paths where such a bundle may lie already. They are used only if they match, and written
    to only if a move of this container (`created` tells it from others of its name) has left them. `trees` go along
    beside the rootfs.
    """

    migration: str
    source: str
    id: str
    created: str
    config: Text
    fingerprint: str
    hints: list[str]
    trees: Trees

    def __post_init__(self) -> None:
        check_migration_id(self.migration)
        _check_digest(self.fingerprint or "0" * 64)
        for tree in self.trees:
            tree.check()

    def check_reply(self, reply: Opened) -> None:
        count = len(self.trees)
        _check(len(reply.trees) == count, f"trees has {len(reply.trees)} items, not {count}")
        _check(len(reply.renewed) == count + 1, f"renewed has {len(reply.renewed)} items, not {count + 1}")


class BundleSent(Call[Done]):
    """rsync is done: the target checks the fingerprint of what it has now."""

    fingerprint: str


class CheckTrees(Call[TreesChecked]):
    """Before anything is touched: can these trees be put there, is what is needed there?

    `reserved` bytes will be taken beside, in /var/lib/pymigrate.
    """

    id: str
    created: str
    trees: Trees
    needed: Annotated[list[Needed], Most(MAX_TREES)]
    reserved: int

    def __post_init__(self) -> None:
        for tree in self.trees:
            tree.check()


class CheckFiles(Call[FilesSeen]):
    """What are these files at the target?"""

    files: Annotated[list[Seen], Most(MAX_FILES)]

    def check_reply(self, reply: FilesSeen) -> None:
        _check(len(reply.files) == len(self.files), "files are not those that were asked for")


class CheckPorts(Call[PortsChecked]):
    """Can a container have these ports in the network namespace at path `netns` ("": the target's own)?"""

    netns: str
    ports: Annotated[list[Bound], Most(MAX_PORTS)]


class TreesSent(Call[Done]):
    """All trees are there, but for what will have changed in those that may be written to: the target checks them."""


class Carried(Record):
    """The part of a container's state that goes along."""

    annotations: Annotated[dict[str, Text], Most(MAX_CALL)]
    created: str
    bundle_hints: list[str]
    resources: dict[str, Json]


class Prepare(Call[Prepared]):
    """Make ready all that a restore needs, before the source is frozen.

    `stdio` names the container's standard streams as CRIU knows them ("pipe:[123]", or "" where there is nothing to
    reconnect). With `tcp_close` it finds its TCP connections closed. It is frozen for `timeout` seconds at most: what
    the target waits for meanwhile must not take longer. `tmpfs` are mounts that the target makes, for files to be sent
    to. `memory` is how many bytes of images are to be expected. `lazy`: most of them come in MEMORY frames, and the
    container may be resumed before they are in place.
    """

    state: Carried
    stdio: list[str]
    tcp_close: bool = False
    timeout: Timeout = FREEZE_TIMEOUT
    tmpfs: list[Mounted] = []
    memory: Annotated[int, Range(0, _MEMORY)] = 0
    lazy: bool = False

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)


class TrialBegin(Call[MemoryReady]):
    """MEMORY frames follow that the target throws away: the source measures how fast it can send memory."""


class TrialEnd(Call[Done]):
    """That was all: the bodies of the frames had `size` bytes."""

    size: Annotated[int, Range(0, MAX_TRIAL)]


class MemoryBegin(Call[MemoryReady]):
    """MEMORY frames follow, with the memory of the running container: some `expected` bytes of it.

    `digest` is the name of a digest (digests.py) of all bodies of a connection. They come over this connection and over
    more `streams`, which the source opens next.
    """

    expected: Annotated[int, Range(0, _MEMORY)]
    digest: str
    streams: Annotated[int, Range(0, MAX_STREAMS - 1)] = 0


class MemoryStreams(Call[Done]):
    """Have all streams come?"""


class MemorySync(Call[Done]):
    """Has the target taken all memory that was sent so far? Bodies of `sizes` bytes, over this connection and streams.

    In a trial, which has no streams, `sizes` is empty.
    """

    sizes: Annotated[tuple[Size, ...], Most(MAX_STREAMS)] = ()


class Sent(Record):
    """What was sent over one connection: bodies of `size` bytes with this digest."""

    size: Size
    digest: str

    def __post_init__(self) -> None:
        _check_wire_digest(self.digest)


class MemoryEnd(Call[Done]):
    """That was all memory: over this connection, and over each stream.

    `shared` has the objects of shared memory that came in MEMORY frames: id of CRIU's image -> space (layout.py).
    """

    streams: Annotated[tuple[Sent, ...], Most(MAX_STREAMS)]
    shared: dict[str, int] = {}


class PagesBegin(Call[Done]):
    """Start a page server; PAGES frames follow. `digest` is the name of a digest (digests.py) of the stream."""

    digest: str


class PagesEnd(Call[Done]):
    """No more pages: `size` bytes with this digest were sent."""

    size: int
    digest: str

    def __post_init__(self) -> None:
        _check_wire_digest(self.digest)


class Image(Call[None]):
    """The image file `name` follows in DATA frames, up to ImageEnd."""

    name: str

    def __post_init__(self) -> None:
        _check(_IMAGE_NAME.fullmatch(self.name) is not None, f"{self.name!r} is not a name of an image file")


class ImageEnd(Call[None]):
    """That was the image: `size` bytes with this SHA-256."""

    size: Annotated[int, Range(0, MAX_IMAGE)]
    digest: str

    def __post_init__(self) -> None:
        _check_digest(self.digest)


class Restore(Call[Restored]):
    """All `count` images are there: restore within `timeout` seconds, and hold before anything runs.

    `roots` has the attributes of the root of each tmpfs of Prepare, by its place in the container. With `lazy` the
    restore does not wait for the memory that came in MEMORY frames.
    """

    count: int
    timeout: Timeout = FREEZE_TIMEOUT
    lazy: bool = False
    roots: dict[str, Root] = {}

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)


class Confirm(Call[Done]):
    """Is the restored tree still held? Asked right before the source gives the container up: a cut shows here."""


class Resume(Call[Resumed]):
    """The source is dead: resume the container."""


class History(Call[Done]):
    """What the container wrote to its log at the source (its last part): `logs` at the target shows it first."""

    log: Text


class Abort(Call[Done]):
    """The source keeps the container: remove everything this move brought."""


_WORKLOADS = {
    "resume": ("TARGET", "NEITHER"), "abort": ("TARGET", "SOURCE"), "ask": ("TARGET", "SOURCE", "UNKNOWN"),
}  # fmt: skip


class Settle(Call[Settled]):
    """A connection was lost in the middle of `migration`: end it, or say how it has ended.

    `verdict` is "resume" (the source has ended the container), "abort" (the source keeps it), or "ask", which changes
    nothing. "resume" never removes anything, unless the container runs then.
    """

    migration: str
    verdict: Verdict

    def __post_init__(self) -> None:
        check_migration_id(self.migration)

    def check_reply(self, reply: Settled) -> None:
        _check(reply.workload in _WORKLOADS[self.verdict], f"workload is {reply.workload[:20]!r}")


# For each version of the protocol that can be spoken: its calls by name.
CALLS: dict[int, dict[str, type[Call[Any]]]] = {
    VERSION: {
        cls.__name__: cls
        for cls in (
            Hello, Facts, Discard, OpenBundle, BundleSent, CheckTrees, CheckFiles, CheckPorts, TreesSent, Prepare,
            TrialBegin, TrialEnd, MemoryBegin, MemoryStreams, MemorySync, MemoryEnd,
            PagesBegin, PagesEnd, Image, ImageEnd, Restore, Confirm, Resume, History, Abort, Settle,
        )
    }
}  # fmt: skip


def encode_call(call: Call[Any]) -> bytes:
    """One CALL frame. Raises MigrateError for one that the target would not take."""
    payload = records.dumps({"call": type(call).__name__, "args": call})
    if len(payload) > MAX_CALL:
        raise MigrateError(f"what is to be said of the container in {type(call).__name__} takes {len(payload)} bytes, "
                           f"more than {MAX_CALL}")  # fmt: skip
    return header(FrameType.CALL, len(payload)) + payload


def decode_call(payload: bytes, version: int = VERSION) -> Call[Any]:
    """The call in a CALL frame of a connection that speaks `version`. Raises ProtocolError."""
    message = records.loads(payload)
    name = message.get("call")
    cls = CALLS[version].get(name) if isinstance(name, str) else None
    if cls is None or message.keys() != {"call", "args"}:
        raise ProtocolError(f"unknown call {str(name)[:40]!r}")
    return records.decode(cls, message["args"], f"call {name}")


def decode_reply(call: Call[R], payload: bytes) -> R:
    """The reply to `call` in a REPLY frame. Raises ProtocolError, which names the call and the field."""
    what = f"the answer to {type(call).__name__}"
    assert call.reply is not None
    reply: R = records.decode(call.reply, records.loads(payload), what)
    try:
        call.check_reply(reply)
    except ProtocolError as error:
        raise ProtocolError(f"{what}: {error}") from None
    return reply


def decode_failure(payload: bytes) -> Failure:
    """What a FAILURE frame says. Raises ProtocolError."""
    return records.decode(Failure, records.loads(payload), "a failure")
