"""The wire between source and target: what a hostile or broken other side can send."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrateError, ProtocolError
from migrate.wire import frames, protocol
from migrate.wire.frames import FrameDecoder, FrameType

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


@pytest.mark.parametrize("kind", [0, 7, 255])
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


CALLS: list[protocol.Call] = [
    protocol.Hello(1, "/run/x"),
    protocol.Facts({"a": [1]}),
    protocol.Discard([MIGRATION]),
    protocol.OpenBundle(MIGRATION, "host1", "web", "2026", "{}", DIGEST, ["/srv/web"], [{"name": "/data"}]),
    protocol.BundleSent(DIGEST),
    protocol.CheckTrees("web", "2026", [{"name": "/data"}], [{}], 5),
    protocol.CheckFiles([{"path": "/x"}]),
    protocol.CheckPorts("", [{"port": 80}]),
    protocol.TreesSent(),
    protocol.Prepare({"annotations": {}}, ["", "pipe:[1]", "pipe:[2]"]),
    protocol.PagesBegin(),
    protocol.PagesEnd(5, DIGEST),
    protocol.Image("core-1.img", 3, DIGEST),
    protocol.Restore(3),
    protocol.Confirm(),
    protocol.Resume(),
    protocol.History("text"),
    protocol.Abort(),
    protocol.Settle(MIGRATION, "resume"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_every_call_survives_the_wire(call: protocol.Call) -> None:
    ((kind, payload),) = FrameDecoder().feed(protocol.encode_call(call))
    assert kind is FrameType.CALL
    assert protocol.decode_call(payload) == call


def test_every_call_of_the_protocol_is_tried_above() -> None:
    assert {type(call) for call in CALLS} == set(protocol.Call.__args__)


def test_every_call_says_what_its_answer_must_be() -> None:
    assert set(protocol._ANSWERS) == set(protocol.Call.__args__) - {protocol.Image}


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (0, {}, "Hello: version is missing"),
        (0, {"version": True}, "Hello: version is not of type int"),
        (5, {"problems": [["a", 1, "b"]], "found": []}, "CheckTrees: problems is not of type"),
        (9, {"tmpfs": {"/tmp": 1}, "cgroup": "", "on_disk": ""}, "Prepare: tmpfs is not of type"),
        (
            3,
            {"bundle": "/b", "rootfs": "r", "complete": True, "trees": [True], "renewed": [True, False], "notes": []},
            "rootfs is not",
        ),
        (
            3,
            {"bundle": "/b", "rootfs": "/r", "complete": True, "trees": [], "renewed": [True, False], "notes": []},
            "trees has 0",
        ),
        (18, {"workload": "SOURCE", "since": "", "reason": ""}, "workload is 'SOURCE'"),
        (18, {"workload": "NEITHER", "since": ""}, "reason is missing"),
    ],
)
def test_an_answer_is_checked_where_it_is_read(number: int, answer: dict[str, Any], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        protocol.check_answer(CALLS[number], answer)


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
    args = {"name": name, "size": 1, "digest": DIGEST}
    with pytest.raises(ProtocolError, match="no name of an image"):
        protocol.decode_call(json.dumps({"call": "Image", "args": args}).encode())


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
