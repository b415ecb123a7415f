"""The agent under a hostile source: damaged images, calls out of order, garbage, a source that vanishes."""

import hashlib
import json
import subprocess
import zlib
from typing import Any

import pytest

from migrate.wire import frames, protocol, records
from migrate.wire.frames import FrameDecoder, FrameType
from tests.system.conftest import Lab

MIGRATION = "20261124T093000-0123456789abcdef"
CARRIED = protocol.Carried({}, "", [], {})
PLAIN = b"\0"  # the form of a payload
CLOSE = (0x1024).to_bytes(4, "little") + bytes(28)  # a page server's last command
AGENT = ["python3", "-c", "import sys; from migrate.target.agent import main; sys.exit(main())"]


def data(payload: bytes, kind: FrameType = FrameType.DATA) -> bytes:
    return frames.header(kind, len(payload)) + payload


def pages() -> list[bytes]:
    """A stream without pages."""
    end = protocol.PagesEnd(len(CLOSE), f"{zlib.crc32(CLOSE):08x}")
    begin = protocol.encode_call(protocol.PagesBegin("crc32"))
    return [begin, data(PLAIN + CLOSE, FrameType.PAGES), protocol.encode_call(end)]


def image(name: str, payload: bytes, *, digest: str = "", size: int = -1) -> list[bytes]:
    """An image, with what the source says of it at its end."""
    end = protocol.ImageEnd(len(payload) if size < 0 else size, digest or hashlib.sha256(payload).hexdigest())
    return [protocol.encode_call(protocol.Image(name)), data(payload), protocol.encode_call(end)]


def converse(lab: Lab, *sent: bytes) -> tuple[list[dict[str, Any]], int]:
    """Send frames and hang up; the agent's answers and its exit status."""
    done = subprocess.run(
        lab.argv("host2", *AGENT), env=lab.environment, input=b"".join(sent), capture_output=True, timeout=60
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr
    answers = [
        {"frame": kind.name, **records.loads(payload)}
        for kind, payload in FrameDecoder().feed(done.stdout)
        if kind is not FrameType.PULSE
    ]
    return answers, done.returncode


@pytest.fixture
def opening(lab: Lab) -> list[bytes]:
    """The calls up to Prepare, for a bundle that lies at host2."""
    lab.run("host2", container="there")
    lab.on("host2", "pymigrate", "delete", "--force", "there")
    bundle = "/var/lib/pymigrate/test/there"
    code = "from pathlib import Path; from migrate.files.fingerprint import fingerprint; "
    code += f"print(fingerprint(Path('{bundle}/rootfs')))"
    digest = lab.on("host2", "python3", "-c", code).stdout.strip()
    config = lab.on("host2", "cat", f"{bundle}/config.json").stdout
    calls: list[protocol.Call[Any]] = [
        protocol.Hello(protocol.VERSION, "/run/opencontainer/containers"),
        protocol.OpenBundle(MIGRATION, "host1", "web", "2026-01-01T00:00:00Z", config, digest, [bundle], []),
        protocol.Prepare(CARRIED, ["", "", ""], False),
    ]
    return [protocol.encode_call(call) for call in calls]


@pytest.mark.parametrize(
    "said",
    [{"digest": hashlib.sha256(b"right").hexdigest()}, {"size": 4}, {"size": 6}],
    ids=["digest", "long", "short"],
)
def test_damaged_image_is_refused_before_anything_is_restored(
    lab: Lab, opening: list[bytes], said: dict[str, Any]
) -> None:
    answers, _ = converse(
        lab, *opening, *pages(), *image("core-1.img", b"wrong", **said), *image("core-2.img", b"whole"),
        protocol.encode_call(protocol.Restore(2)),
    )  # fmt: skip
    assert [answer["frame"] for answer in answers] == ["REPLY"] * 5 + ["FAILURE"]
    assert answers[-1]["message"] == "image core-1.img arrived damaged"
    assert lab.leftovers("host2") == ""


def test_damaged_pages_are_refused(lab: Lab, opening: list[bytes]) -> None:
    """What the source has sent before it hears of that is ignored."""
    answers, code = converse(
        lab, *opening, protocol.encode_call(protocol.PagesBegin("crc32")), data(PLAIN + CLOSE, FrameType.PAGES),
        protocol.encode_call(protocol.PagesEnd(len(CLOSE), "0" * 8)),
        *image("core-1.img", b"right"), protocol.encode_call(protocol.Abort()),
    )  # fmt: skip
    assert [answer["frame"] for answer in answers[-2:]] == ["FAILURE", "REPLY"]
    assert (answers[-2]["message"], code) == ("the memory pages arrived damaged", 0)
    assert lab.leftovers("host2") == ""


def test_missing_image_is_noticed(lab: Lab, opening: list[bytes]) -> None:
    answers, code = converse(lab, *opening, *pages(), protocol.encode_call(protocol.Restore(3)))
    assert (len(answers), code) == (5, 1)
    assert lab.leftovers("host2") == ""


def test_images_that_criu_does_not_understand(lab: Lab, opening: list[bytes]) -> None:
    answers, _ = converse(
        lab, *opening, *pages(), *image("inventory.img", b"\0" * 100), protocol.encode_call(protocol.Restore(1))
    )
    assert (answers[-1]["frame"], answers[-1]["kind"]) == ("FAILURE", "criu")
    assert lab.leftovers("host2") == ""


@pytest.mark.parametrize(
    "call",
    [
        protocol.Prepare(CARRIED, []), protocol.PagesBegin("crc32"), protocol.Restore(0), protocol.Resume(),
        protocol.History(""), protocol.Image("a.img"), protocol.ImageEnd(1, "0" * 64), protocol.Confirm(),
        protocol.Hello(protocol.VERSION, "/run/opencontainer/containers"),
    ],
    ids=lambda call: type(call).__name__,
)  # fmt: skip
def test_calls_out_of_order_end_the_conversation(lab: Lab, call: protocol.Call[Any]) -> None:
    hello = protocol.encode_call(protocol.Hello(protocol.VERSION, "/run/opencontainer/containers"))
    answers, code = converse(lab, hello, protocol.encode_call(call))
    assert (len(answers), code) == (1, 1)


@pytest.mark.parametrize("version", [protocol.VERSION - 1, protocol.VERSION + 1], ids=["older source", "newer source"])
def test_a_source_of_another_version_is_refused_with_one_sentence(lab: Lab, version: int) -> None:
    """As it says hello in every version."""
    hello = json.dumps({"call": "Hello", "args": {"version": version, "root": "/run/x"}}).encode()
    done = subprocess.run(
        lab.argv("host2", *AGENT), env=lab.environment, input=data(hello, FrameType.CALL), capture_output=True,
        timeout=60, text=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line == (
        f"pymigrate agent: the source speaks protocol {version}, this agent {protocol.VERSION}: "
        "both hosts need the same version of pymigrate"
    )


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"\x01\xff\xff\xff\xff", b"\x01\0\0\0\x02{}", b""])
def test_garbage_ends_the_conversation(lab: Lab, garbage: bytes) -> None:
    answers, code = converse(lab, garbage)
    assert (answers, code) == ([], 0 if not garbage else 1)


@pytest.mark.parametrize("root", ["relative", "/a/../b", ""])
def test_a_root_that_is_no_directory_name(lab: Lab, root: str) -> None:
    answers, code = converse(lab, protocol.encode_call(protocol.Hello(protocol.VERSION, root)))
    assert (answers, code) == ([], 1)


def test_a_bad_id_is_refused(lab: Lab) -> None:
    hello = protocol.encode_call(protocol.Hello(protocol.VERSION, "/run/opencontainer/containers"))
    config = json.dumps({"root": {"path": "x"}})
    call = protocol.OpenBundle(MIGRATION, "host1", "../../etc", "2026-01-01T00:00:00Z", config, "0" * 64, [], [])
    answers, _ = converse(lab, hello, protocol.encode_call(call))
    assert (answers[-1]["frame"], answers[-1]["kind"]) == ("FAILURE", "invalid")
    assert lab.leftovers("host2") == ""
