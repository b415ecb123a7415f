"""Every way a CRIU can answer, or not: which error comes of it, what it carries, and that no process is left."""

import errno
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import google.protobuf
import pytest

from criu_rpc import messages
from criu_rpc.client import Criu, DumpSession
from criu_rpc.errors import BadAnswer, CriuNotFound, DeadlineExceeded, RequestFailed, SwrkDied
from criu_rpc.logs import error_lines
from criu_rpc.options import DumpOptions
from criu_rpc.swrk import PageServer
from migrate.preflight.criu_checked import checked_version

FAKE = Path(__file__).with_name("fake_criu.py")
HARMLESS = "(00.01) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted"
CAUSE = "(00.07) Error (criu/files.c:12): Can't dump file 5 of that type"
Dump = Callable[..., DumpSession]


@pytest.fixture
def criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Criu]:
    """A CRIU that does what $FAKE_CRIU says."""
    binary = tmp_path / "criu"
    binary.write_text(f'#!/bin/sh\nexec /usr/bin/python3 {FAKE} "$@"\n')
    binary.chmod(0o755)
    monkeypatch.setenv("FAKE_CRIU_MESSAGES", str(messages.source("rpc_pb2")))
    monkeypatch.setenv("FAKE_CRIU_PROTOBUF", str(Path(google.protobuf.__file__).parents[2]))
    yield Criu(str(binary))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    assert children == "", "a criu is left"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def dump(criu: Criu, directory: int, monkeypatch: pytest.MonkeyPatch) -> Dump:
    """Start a dump by a CRIU that follows a script."""

    def start(*script: list[object], timeout: float = 20) -> DumpSession:
        monkeypatch.setenv("FAKE_CRIU", json.dumps(script))
        options = DumpOptions(pid=1, images_dir_fd=directory, work_dir_fd=directory)
        return criu.dump(options, timeout=timeout)

    return start


def test_check_says_why_criu_cannot_work(criu: Criu, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is where the request said: up to 4.1 a check without a directory fails."""
    monkeypatch.setenv("FAKE_CRIU", json.dumps([["log", HARMLESS, CAUSE], ["fail", 0]]))
    with pytest.raises(RequestFailed, match="criu failed to check: Can't dump file 5 of that type"):
        criu.check(directory)


def test_a_criu_that_works_is_asked_once(
    criu: Criu, directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRIU", json.dumps([["version", 4, 2, 1]]))
    place = tmp_path / "checked"
    assert checked_version(criu, directory, place) == "4.2.1"
    monkeypatch.setenv("FAKE_CRIU", json.dumps([["version", 4, 3, 0]]))
    assert checked_version(criu, directory, place) == "4.2.1"
    os.utime(criu.path)  # another binary
    assert checked_version(criu, directory, place) == "4.3"
    place.write_text("[]")
    monkeypatch.setenv("FAKE_CRIU", json.dumps([["version", 4, 4, 0]]))
    assert checked_version(criu, directory, place) == "4.4"


def test_a_criu_that_does_not_work_is_asked_again(
    criu: Criu, directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRIU", json.dumps([["fail", 0]]))
    for _ in range(2):
        with pytest.raises(RequestFailed):
            checked_version(criu, directory, tmp_path / "checked")
    assert not (tmp_path / "checked").exists()
    monkeypatch.setenv("FAKE_CRIU", json.dumps([["version", 4, 2, 1]]))
    assert checked_version(criu, directory, tmp_path / "checked") == "4.2.1"


def test_only_what_is_wanted_is_asked_for(directory: int) -> None:
    """criu 3.17 does not know every field: its messages refuse a field that they do not know, even for false."""
    request = messages.rpc().criu_req()
    DumpOptions(pid=1, images_dir_fd=directory, work_dir_fd=directory).fill(request.opts)
    assert not request.opts.HasField("tcp_skip_in_flight")
    DumpOptions(pid=1, images_dir_fd=directory, work_dir_fd=directory, tcp_skip_in_flight=True).fill(request.opts)
    assert request.opts.tcp_skip_in_flight


def test_notifications_are_the_callers(dump: Dump) -> None:
    with dump(["notify", "pre-dump", 0], ["notify", "post-dump", 42], ["succeed"]) as session:
        first = session.next()
        assert first is not None
        assert first.script == "pre-dump"
        session.ack()
        assert session.run_until("post-dump").pid == 42
        session.finish()


def test_the_last_that_can_be_refused_is_not_passed(dump: Dump) -> None:
    """CRIU 3.17 has no query-ext-files: the container would be gone by the time that it is missed."""
    script = ["notify", "pre-dump", 0], ["notify", "post-dump", 42], ["succeed"]
    with dump(*script) as session:
        assert session.run_until("query-ext-files", "post-dump").script == "post-dump"
        session.finish()
    with dump(*script) as session:
        with pytest.raises(BadAnswer, match="post-dump before query-ext-files"):
            session.run_until("query-ext-files")
        session.refuse()  # it still waits
        with pytest.raises(RequestFailed):
            session.next()


def test_refusal_is_a_failure(dump: Dump) -> None:
    with dump(["notify", "post-dump", 0]) as session:
        session.run_until("post-dump")
        session.refuse()
        with pytest.raises(RequestFailed):
            session.next()


def test_failure_carries_errno_and_the_last_error_line(dump: Dump) -> None:
    with dump(["log", HARMLESS, CAUSE, "(00.08) Warn  (x.c:1): later"], ["fail", 13]) as session:
        with pytest.raises(RequestFailed) as caught:
            session.finish()
        assert caught.value.errno == errno.EACCES
        assert caught.value.log_tail == ("Can't dump file 5 of that type",)
        assert "EACCES" in str(caught.value)
        assert str(caught.value).endswith("Can't dump file 5 of that type")


@pytest.mark.parametrize(("script", "how"), [(["exit", 3], "exit status 3"), (["die"], "killed by SIGKILL")])
def test_death_says_how(dump: Dump, script: list[object], how: str) -> None:
    with dump(["log", CAUSE], ["notify", "pre-dump", 0], script) as session:
        with pytest.raises(SwrkDied, match=how) as caught:
            session.finish()
        assert caught.value.log_tail == ("Can't dump file 5 of that type",)


@pytest.mark.parametrize("script", [["garbage"], ["type", 11]])
def test_nonsense_is_named(dump: Dump, script: list[object]) -> None:
    with dump(script) as session, pytest.raises(BadAnswer):
        session.finish()


def test_success_before_its_time(dump: Dump) -> None:
    with dump(["succeed"]) as session, pytest.raises(BadAnswer, match="success before post-dump"):
        session.run_until("post-dump")


def test_silence_ends_at_the_deadline(dump: Dump) -> None:
    started = time.monotonic()
    with dump(["hang"], timeout=0.5) as session, pytest.raises(DeadlineExceeded):
        session.finish()
    assert time.monotonic() - started < 10


def test_no_criu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMIGRATE_CRIU", "/nowhere/criu")
    with pytest.raises(CriuNotFound, match="/nowhere/criu"):
        Criu()


def test_error_lines_keep_order_and_leave_out_what_is_harmless() -> None:
    lines = [HARMLESS, CAUSE, "(00.080000)     12: Error (criu/x.c:1): second", "(0.1) noise"]
    assert error_lines("\n".join(lines)) == ("Can't dump file 5 of that type", "second")
    assert error_lines("\n".join([CAUSE] * 9), count=2) == ("Can't dump file 5 of that type",) * 2


def test_a_page_server_is_killed_with_its_children(tmp_path: Path) -> None:
    """CRIU starts some when it has not yet seen the kernel; they would wait for ever."""
    binary = tmp_path / "criu"
    binary.write_text('#!/bin/sh\nsleep 1000 &\necho $! > "$3/child.new"\nmv "$3/child.new" "$3/child"\nwait\n')
    binary.chmod(0o755)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = PageServer.start(str(binary), tmp_path, theirs)
    deadline = time.monotonic() + 10
    while not (tmp_path / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with os.fdopen(os.pidfd_open(int((tmp_path / "child").read_text()))) as child:
        server.kill()
        assert select.select([child], [], [], 10)[0]
