"""The wire between source and target: what a hostile or broken other side can send."""

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrateError, ProtocolError
from migrate.files.trees import Mounted, Needed, Root, Tree
from migrate.wire import frames, protocol, records, replies
from migrate.wire.frames import FrameDecoder, FrameType
from migrate.wire.questions import Bound, FactsQuery, HostFacts, Seen
from migrate.wire.replies import Failure

DIGEST = "0" * 64
MIGRATION = "20261124T093000-0123456789abcdef"


def decoded(data: bytes, size: int) -> Iterator[tuple[FrameType, bytes]]:
    decoder = FrameDecoder()
    for start in range(0, len(data), size):
        yield from decoder.feed(data[start : start + size])


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BI", kind, len(payload)) + payload


@given(st.lists(st.tuples(st.sampled_from(FrameType), st.binary(max_size=frames.MAX_PULSE))), st.integers(1, 50))
def test_frames_survive_any_fragmentation(sent: list[tuple[FrameType, bytes]], size: int) -> None:
    data = b"".join(frames.header(kind, len(payload)) + payload for kind, payload in sent)
    assert list(decoded(data, size)) == sent


@pytest.mark.parametrize("kind", [0, 8, 255])
def test_unknown_frame_type_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match="unknown type"):
        list(FrameDecoder().feed(frame(kind, b"")))


def test_oversized_frame_is_refused_before_its_payload_comes() -> None:
    header = struct.pack(">BI", FrameType.DATA, frames.MAX_DATA + 1)
    with pytest.raises(ProtocolError, match="over the limit"):
        list(FrameDecoder().feed(header))


def test_a_frame_comes_with_its_last_byte() -> None:
    decoder = FrameDecoder()
    data = frame(FrameType.DATA, b"abc")
    assert list(decoder.feed(data[:-1])) == []
    assert list(decoder.feed(data[-1:])) == [(FrameType.DATA, b"abc")]


TREE = Tree("/data", "/srv/a", "/srv/a", fingerprint=DIGEST, size=5)
QUERY = FactsQuery("web", "2026-11-24T09:30:00Z", "/run/x", ("/a",), "eA==", "bridge=br0")
CARRIED = protocol.Carried({"a": "b"}, "2026", ["/srv/web"], {"linux": {"memory": {"limit": 5}}})
CALLS: list[protocol.Call[Any]] = [
    protocol.Hello(1, "/run/x"),
    protocol.Facts(QUERY),
    protocol.Discard([MIGRATION]),
    protocol.OpenBundle(MIGRATION, "host1", "web", "2026", "{}", DIGEST, ["/srv/web"], [TREE]),
    protocol.BundleSent(DIGEST),
    protocol.CheckTrees("web", "2026", [TREE], [Needed("/data", "/srv/b", True)], 5),
    protocol.CheckFiles([Seen("/x", 5, 1 << 62, "ab", DIGEST)]),
    protocol.CheckPorts("", [Bound("tcp", "::", 80, "eth0", reuse_port=True)]),
    protocol.TreesSent(),
    protocol.Prepare(CARRIED, ["", "pipe:[1]"], True, 5.5, [Mounted("/tmp", "size=5k", "tmpfs")], 1 << 40, True),
    protocol.TrialBegin(),
    protocol.TrialEnd(64 << 20),
    protocol.MemoryBegin(1 << 30, "xxh3-128"),
    protocol.MemoryStreams(),
    protocol.MemorySync((5, 7)),
    protocol.MemoryEnd((protocol.Sent(1 << 30, "0" * 32), protocol.Sent(0, "1" * 32)), {"4711": 1 << 31}),
    protocol.PagesBegin("crc32"),
    protocol.PagesEnd(5, "0" * 8),
    protocol.Image("core-1.img"),
    protocol.ImageEnd(3, DIGEST),
    protocol.Restore(3, 5.0, True, {"/tmp": Root(0o1777, 0, 0, 1 << 60, {"user.a": "00ff"})}),
    protocol.Confirm(),
    protocol.Resume(),
    protocol.History("text"),
    protocol.Abort(),
    protocol.Settle(MIGRATION, "resume"),
]
NAMES = {type(call).__name__: call for call in CALLS}
REPLIES: dict[str, Any] = {
    "Hello": replies.Welcome(2, "host2", 5),
    "Facts": HostFacts().replace(name="host2", missing=("/a",), images_free=1 << 50),
    "OpenBundle": replies.Opened("/b", "/b/rootfs", True, [False], [True, False], ["/c is left alone"]),
    "CheckTrees": replies.TreesChecked([replies.TreeProblem("no-space", "/srv", "has 1 MiB free")], ["/etc/hosts"]),
    "CheckFiles": replies.FilesSeen([Seen("/x")]),
    "CheckPorts": replies.PortsChecked([replies.PortProblem("tcp [::]:80", "is in use there")]),
    "Prepare": replies.Prepared({"/tmp": "/var/x"}, "", ""),
    "TrialBegin": replies.MemoryReady("no userfaultfd", True),
    "MemoryBegin": replies.MemoryReady("no userfaultfd", True),
    "Restore": replies.Restored(5),
    "Resume": replies.Resumed(5),
    "Settle": replies.Settled("TARGET", "2026"),
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_every_call_survives_the_wire(call: protocol.Call[Any]) -> None:
    ((kind, payload),) = FrameDecoder().feed(protocol.encode_call(call))
    assert kind is FrameType.CALL
    assert protocol.decode_call(payload) == call


@pytest.mark.parametrize("call", [call for call in CALLS if call.reply], ids=lambda call: type(call).__name__)
def test_every_reply_survives_the_wire(call: protocol.Call[Any]) -> None:
    reply = REPLIES.get(type(call).__name__, replies.Done())
    assert protocol.decode_reply(call, records.dumps(reply)) == reply


def test_every_call_of_the_protocol_is_tried_above() -> None:
    assert NAMES.keys() == protocol.CALLS[protocol.VERSION].keys()
    assert {name for name, call in NAMES.items() if call.reply is None} == {"Image", "ImageEnd"}


def changed(value: Any, change: Any) -> Any:
    """A record as JSON, with fields replaced; one of value None is left out."""
    return {name: item for name, item in (records.encode(value) | change).items() if item is not None}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("Hello", {"version": None}, "Hello: version is missing"),
        ("Hello", {"version": True}, "Hello: version is not of type int"),
        ("Hello", {"more": 1}, "Hello: 'more' is not a field that this version knows"),
        ("Facts", {"bits": "64"}, "Facts: bits is not of type int"),
        ("Facts", {"limits": [1]}, r"Facts: limits\[0\] is not of type str"),
        ("CheckTrees", {"problems": [["a", 1, "b"]]}, r"CheckTrees: problems\[0\] is not of type TreeProblem"),
        ("CheckTrees", {"problems": [{"rule": "a", "path": 1, "text": ""}]}, r"problems\[0\]\.path is not of type str"),
        ("CheckTrees", {"found": ["x"] * 20_000}, "found has 20000 items, more than"),
        ("CheckFiles", {"files": []}, "CheckFiles: files are not those"),
        ("CheckFiles", {"files": [{}]}, r"CheckFiles: files\[0\]\.path is missing"),
        ("Prepare", {"tmpfs": {"/tmp": 1}}, r"Prepare: tmpfs\['/tmp'\] is not of type str"),
        ("Prepare", {"on_disk": "x" * 100_000}, "Prepare: on_disk has 100000 characters"),
        ("OpenBundle", {"rootfs": "r"}, "OpenBundle: rootfs is not an absolute path"),
        ("OpenBundle", {"trees": []}, "OpenBundle: trees has 0"),
        ("Restore", {"pid": 1 << 80}, "Restore: pid is .*, not between"),
        ("Settle", {"workload": "SOURCE"}, "workload is 'SOURCE'"),
        ("Settle", {"workload": "NEITHER", "reason": None}, "reason is missing"),
    ],
)
def test_a_reply_is_checked_where_it_is_read(name: str, change: Any, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        protocol.decode_reply(NAMES[name], json.dumps(changed(REPLIES[name], change)).encode())


@pytest.mark.parametrize("payload", [b"[]", b"{}", b'{"kind": "x", "message": 5, "remedy": ""}', b"\xff"])
def test_a_malformed_failure_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_failure(payload)


def test_a_failure_is_cut_to_what_it_may_be() -> None:
    failure = Failure.of("criu", "x" * 10_000, "y" * 10_000)
    assert protocol.decode_failure(records.dumps(failure)) == failure


def test_a_call_that_no_target_would_take_is_not_sent() -> None:
    with pytest.raises(MigrateError, match="more than"):
        protocol.encode_call(protocol.History("x" * frames.MAX_CALL))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"call": "Hello"}',
        b'{"call": "Hello", "args": {"version": 1}}',
        b'{"call": "Hello", "args": {"version": "1", "root": "/"}}',
        b'{"call": "Hello", "args": {"version": true, "root": "/"}}',
        b'{"call": "Hello", "args": {"version": 1, "root": "/", "more": 1}}',
        b'{"call": ["Hello"], "args": {}}',
        b'{"call": "__class__", "args": {}}',
        b'{"call": "Prepare", "args": {"state": {}, "stdio": [1]}}',
        b'{"call": "Confirm", "args": {}, "more": 1}',
        b'{"call": "Confirm", "args": []}',
        b"[" * 100_000,
    ],
)
def test_malformed_call_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_call(payload)


@pytest.mark.parametrize(
    "name", ["../x.img", "/etc/passwd", "a/b.img", ".img", "x.img\n", "core-1.img.x", "x" * 200 + ".img", ""]
)
def test_image_names_cannot_leave_the_directory(name: str) -> None:
    with pytest.raises(ProtocolError, match="not a name of an image"):
        protocol.decode_call(json.dumps({"call": "Image", "args": {"name": name}}).encode())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("Prepare", {"timeout": 1e9}, "call Prepare: timeout is 1000000000.0, not between"),
        ("Prepare", {"timeout": 0.0}, "cannot be frozen for 0"),
        ("Prepare", {"memory": -1}, "memory is -1, not between"),
        ("Prepare", {"tmpfs": [{"place": "/x", "options": "lowerdir=/", "source": "x"}]}, r"tmpfs\[0\] .*options"),
        ("Restore", {"timeout": float("nan")}, "not JSON"),
        ("Restore", {"roots": {"/x": {}}}, r"roots\['/x'\]\.mode is missing"),
        ("MemoryEnd", {"streams": [{"size": 1, "digest": 7}]}, "digest is not of type str"),
        ("MemoryEnd", {"streams": [{"size": 1, "digest": "0" * 9}]}, "not a digest"),
        ("MemoryEnd", {"streams": [{"size": 1, "digest": "0" * 32}] * 17}, "streams"),
        ("MemoryBegin", {"streams": 16}, "streams"),
        ("ImageEnd", {"size": 1 << 41}, "size is .*, not between"),
        ("ImageEnd", {"digest": "0"}, "not a SHA-256"),
        ("PagesEnd", {"digest": "0" * 8 + "\n"}, "not a digest"),
        ("ImageEnd", {"digest": DIGEST + "\n"}, "not a SHA-256"),
        ("OpenBundle", {"trees": [records.encode(TREE)] * 201}, "trees has 201 items, more than 200"),
        ("OpenBundle", {"trees": [changed(TREE, {"place": "/proc/x"})]}, "no tree may be put at"),
        ("CheckTrees", {"trees": [changed(TREE, {"size": -1})]}, "tree '/data' is malformed"),
        ("CheckPorts", {"ports": [{}]}, r"ports\[0\]\.protocol is missing"),
        ("Facts", {"query": changed(QUERY, {"paths": ["relative"]})}, "query .*paths must be absolute"),
        ("Discard", {"migrations": ["../x"]}, "invalid migration id"),
        ("Settle", {"verdict": "maybe"}, "verdict is 'maybe', not one of resume, abort, ask"),
    ],
)
def test_a_call_is_checked_where_it_is_read(name: str, change: Any, words: str) -> None:
    args = changed(NAMES[name], change)
    with pytest.raises(ProtocolError, match=words):
        protocol.decode_call(json.dumps({"call": name, "args": args}).encode())


def test_json_of_no_particular_shape_is_not_deep() -> None:
    deep: Any = 1
    for _ in range(30):
        deep = [deep]
    call = NAMES["Prepare"].replace(state=CARRIED.replace(resources={"a": deep}))
    ((_, payload),) = FrameDecoder().feed(protocol.encode_call(call))
    with pytest.raises(ProtocolError, match=r"state\.resources\['a'\] is nested more than 20 deep"):
        protocol.decode_call(payload)


@pytest.mark.parametrize("migration", ["../../etc", "20261124T093000-0123456789abcdeg", "", "x/y"])
def test_migration_ids_cannot_be_paths(migration: str) -> None:
    args = {"migration": migration, "verdict": "abort"}
    with pytest.raises(ProtocolError, match="invalid migration id"):
        protocol.decode_call(json.dumps({"call": "Settle", "args": args}).encode())


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_else(data: bytes) -> None:
    try:
        for kind, payload in FrameDecoder().feed(data):
            if kind is FrameType.CALL:
                protocol.decode_call(payload)
    except ProtocolError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def spoilt(value: Any, draw: Callable[[Any], Any]) -> Any:
    """A JSON value with one thing replaced somewhere in it."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        copy = value.copy()
        copy[key] = spoilt(value[key], draw)
        return copy
    return draw(JSON)


@given(st.data(), st.sampled_from(CALLS))
def test_a_spoilt_call_or_reply_is_taken_or_a_protocol_error(data: st.DataObject, call: protocol.Call[Any]) -> None:
    name = type(call).__name__
    args = json.dumps({"call": name, "args": spoilt(records.encode(call), data.draw)}).encode()
    with contextlib.suppress(ProtocolError):
        assert type(protocol.decode_call(args)) is type(call)
    if call.reply is not None:
        reply = json.dumps(spoilt(records.encode(REPLIES.get(name, replies.Done())), data.draw)).encode()
        with contextlib.suppress(ProtocolError):
            assert type(protocol.decode_reply(call, reply)) is call.reply
