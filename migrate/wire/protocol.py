"""The conversation of the two ends of a move, without I/O.

A connection carries frames, both ways: a type (1 byte), a length (4 bytes, big endian), and that many bytes.

    CALL     source -> target  JSON {"call": NAME, "args": {...}}: one of the classes below, nothing else
    REPLY    target -> source  JSON object: the answer to the oldest unanswered call
    FAILURE  target -> source  JSON {"kind", "message", "remedy"}: the call failed
    PAGES    source -> target  the next bytes of CRIU's page-server stream
    DATA     source -> target  the next bytes of the image announced last by `Image`
    PULSE    target -> source  every few seconds, so that a dead connection shows at the target as well: a decimal
                               number that changes as long as a process there receives files

Order of a move: Hello, Facts, CheckPorts, CheckTrees, CheckFiles, OpenBundle, [rsync over channels of its own,
BundleSent for a rootfs, TreesSent for what may change and what comes beside], Prepare, PagesBegin, PAGES..., PagesEnd,
(Image, DATA...)*, [rsync], Restore (answer: prepared, held), Confirm (answer: still held), Resume (answer: resumed),
History. Abort at any point before Resume; a lost connection there means the same. Image has no answer: its failure is
Restore's.

Whatever comes in is bounded and checked here: types, lengths, names. `ProtocolError` is the other side's fault.
"""

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass

from migrate.errors import MigrateError, ProtocolError
from migrate.model import FREEZE_TIMEOUT, MAX_FREEZE_TIMEOUT, check_migration_id
from migrate.wire.frames import MAX_CALL, FrameType, header

VERSION = 1

_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}\.img")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(what)


def _check_timeout(value: float) -> None:
    _check(0 < value <= MAX_FREEZE_TIMEOUT, f"{value!r} s is no time that a container may be frozen")


@dataclass(frozen=True)
class Hello:
    """Which protocol the source speaks, and which file system root it means by a container store."""

    version: int
    root: str


@dataclass(frozen=True)
class Facts:
    """Ask the target for its HostFacts; `query` is a FactsQuery as JSON."""

    query: dict[str, typing.Any]


@dataclass(frozen=True)
class OpenBundle:
    """`source` begins to move container `id`: where does its bundle lie at the target, and is its rootfs there?

    `config` is config.json as text, `fingerprint` that of the rootfs (files.fingerprint), "" for one that the container
    may write to; `hints` are paths where such a bundle may lie already. They are used only if they match, and written
    to only if a move of this container (`created` tells it from others of its name) has left them. `trees` are
    trees.Tree as JSON: what goes along beside the rootfs.
    """

    migration: str
    source: str
    id: str
    created: str
    config: str
    fingerprint: str
    hints: list[str]
    trees: list[dict[str, typing.Any]]

    def __post_init__(self) -> None:
        check_migration_id(self.migration)
        _check(_DIGEST.fullmatch(self.fingerprint or "0" * 64) is not None, f"{self.fingerprint!r} is no SHA-256")


@dataclass(frozen=True)
class Discard:
    """The source has aborted these moves without being able to say so: the target removes what it has of them."""

    migrations: list[str]

    def __post_init__(self) -> None:
        for migration in self.migrations:
            check_migration_id(migration)


@dataclass(frozen=True)
class BundleSent:
    """rsync is done: the target checks the fingerprint of what it has now."""

    fingerprint: str


@dataclass(frozen=True)
class CheckTrees:
    """Before anything is touched: can these trees (trees.Tree) be put there, is what is needed (trees.Needed) there?

    `reserved` bytes will be taken beside, in /var/lib/pymigrate. Answers as treestore.check does.
    """

    id: str
    created: str
    trees: list[dict[str, typing.Any]]
    needed: list[dict[str, typing.Any]]
    reserved: int


@dataclass(frozen=True)
class CheckFiles:
    """What are these files at the target? `files` are openfiles.Seen as JSON; answers {"files": [...]}, the same."""

    files: list[dict[str, typing.Any]]


@dataclass(frozen=True)
class CheckPorts:
    """Can a container have these ports in the network namespace at path `netns` ("": the target's own)?

    `ports` are ports.Bound as JSON; answers as ports.answer does.
    """

    netns: str
    ports: list[dict[str, typing.Any]]


@dataclass(frozen=True)
class TreesSent:
    """All trees are there, but for what will have changed in those that may be written to: the target checks them."""


@dataclass(frozen=True)
class Prepare:
    """Make ready all that a restore needs, before the source is frozen.

    `state` holds what goes along of the container's state: annotations, created, bundle hints, updated resources;
    `stdio` names its standard streams as CRIU knows them ("pipe:[123]", or "" where there is nothing to reconnect).
    With `tcp_close` the container finds its TCP connections closed. It is frozen for `timeout` seconds at most: what
    the target waits for meanwhile must not take longer. `tmpfs` are tmpfs.Mounted as JSON: mounts that the target
    makes, for files to be sent to. `memory` is how many bytes of images are to be expected. Answers {"tmpfs": {place in
    the container: path there} of those that it has made, "cgroup": what comes into them is charged to that one, or "",
    "on_disk": why the images cannot be in memory there, or ""}.
    """

    state: dict[str, typing.Any]
    stdio: list[str]
    tcp_close: bool = False
    timeout: float = FREEZE_TIMEOUT
    tmpfs: list[dict[str, typing.Any]] = dataclasses.field(default_factory=list)
    memory: int = 0

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)
        _check(0 <= self.memory < 1 << 50, f"{self.memory} is not the size of a container's memory")


@dataclass(frozen=True)
class PagesBegin:
    """Start a page server; PAGES frames follow."""


@dataclass(frozen=True)
class PagesEnd:
    """No more pages: `size` bytes with this SHA-256 were sent."""

    size: int
    digest: str

    def __post_init__(self) -> None:
        _check(_DIGEST.fullmatch(self.digest) is not None, f"{self.digest!r} is no SHA-256")


@dataclass(frozen=True)
class Image:
    """`size` bytes of DATA follow: the image file `name`, with this SHA-256."""

    name: str
    size: int
    digest: str

    def __post_init__(self) -> None:
        _check(_IMAGE_NAME.fullmatch(self.name) is not None, f"{self.name!r} is no name of an image file")
        _check(0 <= self.size < 1 << 40, f"{self.size} is no size of an image file")
        _check(_DIGEST.fullmatch(self.digest) is not None, f"{self.digest!r} is no SHA-256")


@dataclass(frozen=True)
class Restore:
    """All `count` images are there: restore within `timeout` seconds, hold before anything runs, answer {"pid"}.

    `roots` has for each tmpfs of Prepare, by its place in the container, a tmpfs.Root as JSON.
    """

    count: int
    timeout: float = FREEZE_TIMEOUT
    roots: dict[str, typing.Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_timeout(self.timeout)


@dataclass(frozen=True)
class Confirm:
    """Is the restored tree still held? Asked right before the source gives the container up: a cut shows here."""


@dataclass(frozen=True)
class Resume:
    """The source is dead: let the container run."""


@dataclass(frozen=True)
class History:
    """What the container wrote to its log at the source (its last part): `logs` at the target shows it first."""

    log: str


@dataclass(frozen=True)
class Abort:
    """The source keeps the container: remove everything this move brought."""


@dataclass(frozen=True)
class Settle:
    """A connection was lost in the middle of `migration`: end it, or say how it has ended.

    `verdict` is "resume" (the source has ended the container), "abort" (the source keeps it), or "ask", which changes
    nothing. Answers {"workload": TARGET | SOURCE | NEITHER | UNKNOWN, "since": when it was resumed if that was before
    this call, "reason": why it is NEITHER}; both are "" otherwise. "resume" never removes anything, unless the
    container runs then.
    """

    migration: str
    verdict: str

    def __post_init__(self) -> None:
        check_migration_id(self.migration)
        _check(self.verdict in ("resume", "abort", "ask"), f"{self.verdict!r} is no verdict")


Call = (
    Hello
    | Facts
    | Discard
    | OpenBundle
    | BundleSent
    | CheckTrees
    | CheckFiles
    | CheckPorts
    | TreesSent
    | Prepare
    | PagesBegin
    | PagesEnd
    | Image
    | Restore
    | Confirm
    | Resume
    | History
    | Abort
    | Settle
)
_CALLS: dict[str, type[Call]] = {cls.__name__: cls for cls in typing.get_args(Call)}

# The fields that the answer to a call must have; Facts answers with a HostFacts, which checks itself.
_ANSWERS: dict[type[Call], dict[str, typing.Any]] = {
    Hello: {"version": int},
    Facts: {},
    Discard: {},
    OpenBundle: {
        "bundle": str,
        "rootfs": str,
        "complete": bool,
        "trees": list[bool],
        "renewed": list[bool],
        "notes": list[str],
    },
    BundleSent: {},
    CheckTrees: {"problems": list[list[str]], "found": list[str]},
    CheckFiles: {"files": list[dict[str, typing.Any]]},
    CheckPorts: {"problems": list[list[str]]},
    TreesSent: {},
    Prepare: {"tmpfs": dict[str, str], "cgroup": str, "on_disk": str},
    PagesBegin: {},
    PagesEnd: {},
    Restore: {"pid": int},
    Confirm: {},
    Resume: {"pid": int},
    History: {},
    Abort: {},
    Settle: {"workload": str, "since": str, "reason": str},
}

_WORKLOADS = {
    "resume": ("TARGET", "NEITHER"), "abort": ("TARGET", "SOURCE"), "ask": ("TARGET", "SOURCE", "UNKNOWN"),
}  # fmt: skip


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def loads(payload: bytes) -> dict[str, typing.Any]:
    """A JSON object from the wire. Raises ProtocolError."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError("a message is not a JSON object")
    return value


def check_answer(call: Call, answer: dict[str, typing.Any]) -> None:
    """Raise ProtocolError, which names the field, unless `answer` has the shape that an answer to `call` must have."""
    what = f"the answer to {type(call).__name__}"
    for name, hint in _ANSWERS.get(type(call), {}).items():
        _check(name in answer, f"{what}: {name} is missing")
        _check(_fits(answer[name], hint), f"{what}: {name} is not of type {getattr(hint, '__name__', hint)}")
    if isinstance(call, Settle):
        _check(answer["workload"] in _WORKLOADS[call.verdict], f"{what}: workload is {answer['workload'][:20]!r}")
    if isinstance(call, OpenBundle):
        for name, count in (("trees", len(call.trees)), ("renewed", len(call.trees) + 1)):
            _check(len(answer[name]) == count, f"{what}: {name} has {len(answer[name])} items, not {count}")
        for name in ("bundle", "rootfs"):
            _check(answer[name].startswith("/") and "\0" not in answer[name], f"{what}: {name} is not an absolute path")


def encode_call(call: Call) -> bytes:
    """One CALL frame. Raises MigrateError for one that the target would not take."""
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    payload = dumps({"call": type(call).__name__, "args": fields})
    if len(payload) > MAX_CALL:
        raise MigrateError(f"what is to be said of the container in {type(call).__name__} takes {len(payload)} bytes, "
                           f"more than {MAX_CALL}")  # fmt: skip
    return header(FrameType.CALL, len(payload)) + payload


def decode_call(payload: bytes) -> Call:
    """The call in a CALL frame, every field of the type its class says. Raises ProtocolError."""
    message = loads(payload)
    cls = _CALLS.get(message.get("call", "")) if isinstance(message.get("call"), str) else None
    args = message.get("args")
    if cls is None or not isinstance(args, dict):
        raise ProtocolError(f"unknown call {str(message.get('call'))[:40]!r}")
    hints = typing.get_type_hints(cls)
    if set(args) != set(hints):
        raise ProtocolError(f"call {cls.__name__} wants the fields {sorted(hints)}, not {sorted(args)}"[:300])
    for name, hint in hints.items():
        if not _fits(args[name], hint):
            raise ProtocolError(f"call {cls.__name__}: field {name} is not of type {hint}")
    return cls(**args)


def _fits(value: object, hint: typing.Any) -> bool:
    """Whether a decoded JSON value is of the annotated type (str, int, float, bool, Any, list[...], dict[str, ...])."""
    if hint is typing.Any:
        return True
    if not isinstance(hint, types.GenericAlias):
        return type(value) is hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)[-1]
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    return isinstance(value, dict) and all(_fits(item, inner) for item in value.values())
