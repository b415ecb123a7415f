"""Trees: recognised by fingerprint, sent by a real rsync through a channel."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.errors import MigrateError, NoSpace, ProtocolError
from migrate.files import rsync
from migrate.files import scan as tree_scan
from migrate.files.fingerprint import fingerprint, size
from migrate.files.rsync import send_tree


class ShellChannel:
    """What SSH would give us: a command run by a shell, its stdin and stdout as a stream."""

    def __init__(self, command: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            ["sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )  # fmt: skip

    def sendall(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def recv(self, size: int) -> bytes:
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), size)

    def shutdown_write(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def exit_status(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Here:
    """This machine as a target."""

    name = "there"

    def __init__(self, open_channel: Callable[[str], ShellChannel] = ShellChannel) -> None:
        self.open_channel = open_channel

    def signs(self) -> object:
        return time.monotonic()

    def is_silent(self) -> bool:
        return False


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Everything that a root file system can hold."""
    root = tmp_path / "tree"
    (root / "a dir" / "-dash").mkdir(parents=True)
    (root / "new\nline").write_text("x")
    (root / "file").write_bytes(os.urandom(100_000))
    os.link(root / "file", root / "a dir" / "hard")
    (root / "outside").symlink_to("../../../../etc/passwd")
    (root / "dangling").symlink_to("nothing")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    with (root / "sparse").open("wb") as file:
        file.truncate(50_000_000)
    os.setxattr(root / "file", "user.x", b"y")
    os.chown(root / "new\nline", 12345, 23456)
    (root / "suid").write_text("")
    (root / "suid").chmod(0o4755)
    return root


def send(tree: Path, to: Path, channel: Callable[[str], ShellChannel] = ShellChannel) -> int:
    deadline = time.monotonic() + 60
    return send_tree(Here(channel), tree, str(to), on_progress=lambda _: None, deadline=deadline).bytes_sent


def test_a_tree_arrives_whole(tree: Path, tmp_path: Path) -> None:
    to = tmp_path / "to 'there'"
    to.mkdir()
    send(tree, to)
    assert fingerprint(to) == fingerprint(tree)
    assert (to / "file").read_bytes() == (tree / "file").read_bytes()
    assert (to / "file").stat().st_ino == (to / "a dir" / "hard").stat().st_ino
    assert (to / "sparse").stat().st_blocks < 1000
    assert os.getxattr(to / "file", "user.x") == b"y"
    assert (to / "new\nline").stat().st_uid == 12345
    assert send(tree, to) < 5000, "the second time next to nothing is sent"
    (to / "more").write_text("")
    send(tree, to)
    assert not (to / "more").exists()


def test_a_living_tree_tells_every_name_that_was_touched(tree: Path, tmp_path: Path) -> None:
    (tree / '\\#101 "quoted"').write_text("")
    (tree / os.fsdecode(b"\xff")).mkdir()
    (tmp_path / "to").mkdir()
    deadline = time.monotonic() + 60
    sent = send_tree(Here(), tree, str(tmp_path / "to"), on_progress=lambda _: None, deadline=deadline, living=True)
    assert sent.names - {b"."} == set(tree_scan.scan(str(tree)).entries) - {b"."}


def test_what_the_other_rsync_says_is_bounded(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can have as much said here as it likes."""
    monkeypatch.setattr(rsync, "SAID_LIMIT", 4096)
    (tmp_path / "to").mkdir()
    with pytest.raises(ProtocolError, match="there: rsync there printed more than 4096 bytes"):
        send(tree, tmp_path / "to", lambda command: ShellChannel(command.replace(" --server", " --server -vvvv", 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "file").write_bytes(b"other"),
        lambda root: (root / "suid").chmod(0o755),
        lambda root: (root / "fifo").unlink(),
        lambda root: (root / "z").mkdir(),
        lambda root: os.utime(root / "file", (1, 1)),
        lambda root: ((root / "dangling").unlink(), (root / "dangling").symlink_to("other")),
    ],
)
def test_every_change_changes_the_fingerprint(tree: Path, change: Callable[[Path], object]) -> None:
    before = fingerprint(tree)
    assert fingerprint(tree) == before
    change(tree)
    assert fingerprint(tree) != before


def test_size_counts_hard_links_once_and_holes_not(tree: Path) -> None:
    assert 100_000 <= size(tree) < 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(tree: Path, small_disk: Path) -> None:
    with pytest.raises(NoSpace, match="no room at there"):
        send(tree, small_disk)


def test_peer_that_dies_in_the_middle(tree: Path, tmp_path: Path) -> None:
    (tree / "big").write_bytes(os.urandom(20_000_000))

    class Dying(ShellChannel):
        def sendall(self, data: bytes) -> None:
            super().sendall(data)
            if len(data) > 1000:
                os.killpg(self.process.pid, signal.SIGKILL)

    (tmp_path / "to").mkdir()
    with pytest.raises(MigrateError):
        send(tree, tmp_path / "to", Dying)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in children]
    assert "rsync" not in names


def test_no_rsync_at_the_target(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(MigrateError, match="rsync is not installed at the target"):
        send(tree, tmp_path, lambda command: ShellChannel(f"PATH=/nowhere; exec {command}"))


def test_unreadable_tree(tmp_path: Path) -> None:
    with pytest.raises(MigrateError, match="cannot be read"):
        fingerprint(tmp_path / "nothing")


def test_sockets_are_part_of_a_tree(tree: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "sock"))
    assert fingerprint(tree)
