"""The first stage at a target: what it unpacks, what it runs, and what it replaces."""

import hashlib
import marshal
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.wire import bootstrap
from migrate.wire.agent_zip import AgentZip

MAIN = b"""
import os, sys
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import plain, package.inner
print(plain.__file__.rpartition("/")[2], package.inner.WORD, sys.argv[1:], flush=True)
"""
MEMBERS = [
    ("__main__.py", MAIN), ("package/__init__.py", b""), ("package/inner.py", b"WORD = 'inner'\n"),
    ("plain.py", b""), ("unused.py", b"\n"),
]  # fmt: skip
FOUND = "plain.py inner ['agent']\n"
NOBODY = 65534
TOKEN = "0" * 32


def packed(members: list[tuple[str, bytes]]) -> AgentZip:
    data = zlib.compress(marshal.dumps(members, 2))
    return AgentZip(data, hashlib.sha256(data).hexdigest(), sum(len(content) for _, content in members))


AGENT = packed(MEMBERS)


class Target:
    """A place that stands for /run/pymigrate, in one that stands for /run."""

    def __init__(self, run: Path) -> None:
        self.run, self.top = run, run / "pymigrate"
        self.agent = self.top / f"agent-{AGENT.digest}"

    def start(self, *prefix: str, agent: AgentZip = AGENT) -> "subprocess.Popen[bytes]":
        stage, *rest = bootstrap.arguments(agent, TOKEN)
        stage = stage.replace('"/run/pymigrate"', f'"{self.top}"').replace('"/run"', f'"{self.run}"')
        argv = [*prefix, "/usr/bin/python3", "-I", "-S", "-c", stage, *rest]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ends(self, process: "subprocess.Popen[bytes]", data: bytes = AGENT.data) -> tuple[str, int, str]:
        """The last word of the banner, the exit status, and what was printed after it, or to stderr."""
        out, error = process.communicate(data)
        banner, _, printed = out.decode().partition("\n")
        return banner.rpartition(" ")[2], process.returncode, printed + error.decode()

    def __call__(self, *prefix: str) -> tuple[str, int, str]:
        return self.ends(self.start(*prefix))

    def names(self) -> list[str]:
        return sorted(path.name for path in self.top.iterdir())


@pytest.fixture
def target() -> Iterator[Target]:
    run = Path(f"/run/pymigrate-test-{os.getpid()}")
    run.mkdir(0o755)
    yield Target(run)
    shutil.rmtree(run)


def test_the_second_start_receives_and_compiles_nothing(target: Target) -> None:
    assert target() == ("SEND", 0, FOUND)
    cached = list(target.agent.rglob("*.pyc"))
    assert {path.name.partition(".")[0] for path in cached} == {"__init__", "inner", "plain"}
    everything = [target.agent, *target.agent.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in everything} == {0o700, 0o600}
    (inner,) = (path for path in cached if path.name.startswith("inner"))
    inner.write_bytes(inner.read_bytes().replace(b"inner", b"taken"))
    assert target() == ("HAVE", 0, FOUND.replace("inner", "taken"))
    assert target.names() == [target.agent.name]


def test_a_umask_of_the_log_in_does_not_matter(target: Target) -> None:
    for word in ("SEND", "HAVE", "HAVE"):
        assert target("/bin/sh", "-c", 'umask 0; exec "$@"', "sh") == (word, 0, FOUND)


def test_what_arrives_damaged_is_not_unpacked(target: Target) -> None:
    damaged = AGENT.data[:-1] + bytes([AGENT.data[-1] ^ 1])
    assert target.ends(target.start(), damaged)[:2] == ("SEND", 74)
    assert target.ends(target.start(), AGENT.data[:-1])[:2] == ("SEND", 73)
    assert target.names() == []


@pytest.mark.parametrize("what", ["half", "missing", "truncated", "empty", "file", "link", "inner-link", "fifo"])
def test_what_is_incomplete_or_something_else_is_replaced(target: Target, what: str) -> None:
    target()
    inner, away = target.agent / "package" / "inner.py", target.run / "away"
    match what:
        case "half":
            shutil.rmtree(target.agent / "package")
        case "missing":
            inner.unlink()
        case "truncated":
            inner.write_bytes(b"")
        case "empty":
            shutil.rmtree(target.agent)
            target.agent.mkdir(0o700)
        case "file":
            shutil.rmtree(target.agent)
            target.agent.touch()
        case "link":
            target.agent.rename(away)
            target.agent.symlink_to(away)
        case "inner-link":
            inner.rename(away)
            inner.symlink_to(away)
        case "fifo":
            os.mkfifo(target.agent / "fifo")
    assert target() == ("SEND", 0, FOUND)
    assert target() == ("HAVE", 0, FOUND)
    assert target.names() == [target.agent.name]
    assert what != "link" or away.is_dir()


@pytest.mark.parametrize("who", ["directory", "file", "code", "mode", "inner-mode", "file-mode", "code-mode"])
def test_an_agent_that_another_user_can_write_to_is_replaced(target: Target, who: str) -> None:
    target()
    (code,) = (target.agent / "package" / "__pycache__").glob("inner.*")
    path = {
        "directory": target.agent, "file": target.agent / "package" / "inner.py", "code": code,
        "mode": target.agent, "inner-mode": target.agent / "package",
        "file-mode": target.agent / "package" / "inner.py", "code-mode": code,
    }[who]  # fmt: skip
    code.write_bytes(code.read_bytes().replace(b"inner", b"taken"))
    if who.endswith("mode"):
        path.chmod(0o777)
    else:
        os.chown(path, NOBODY, NOBODY)
    assert target() == ("SEND", 0, FOUND)


@pytest.mark.parametrize("who", ["top", "top-mode", "parent", "parent-mode", "link"])
def test_nothing_is_run_where_another_user_can_write(target: Target, who: str) -> None:
    target()
    place = target.run if who.startswith("parent") else target.top
    if who == "link":
        target.top.rename(target.run / "away")
        target.top.symlink_to(target.run / "away")
    elif who.endswith("mode"):
        place.chmod(0o777)
    else:
        os.chown(place, NOBODY, NOBODY)
    word, status, _ = target()
    assert (word, status) == ("", 72 if who == "link" else 75)


def test_a_parent_that_is_everybodys_but_sticky(target: Target) -> None:
    target.run.chmod(0o1777)
    assert target() == ("SEND", 0, FOUND)
    assert target() == ("HAVE", 0, FOUND)


def test_a_first_stage_that_was_killed(target: Target) -> None:
    """Nothing that it has left is ever run, and the next one removes it."""
    process = target.start()
    assert process.stdout is not None
    assert process.stdout.readline().endswith(b" SEND\n")
    half = target.top / f"agent-{AGENT.digest}.{process.pid}"
    assert half.exists()
    assert target() == ("SEND", 0, FOUND)
    assert half.exists()  # its maker lives
    process.kill()
    process.communicate()
    half.unlink()
    (half / "package").mkdir(parents=True)
    assert target() == ("HAVE", 0, FOUND)
    assert target.names() == [target.agent.name]


def test_two_starts_at_once(target: Target) -> None:
    processes = [target.start() for _ in range(4)]
    banners = [process.stdout.readline() for process in processes if process.stdout is not None]
    assert all(banner.endswith(b" SEND\n") for banner in banners)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(AGENT.data)
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == [FOUND.encode()] * 4
    assert target.names() == [target.agent.name]


@pytest.mark.parametrize("room", [0, 100], ids=["nothing", "half"])
def test_no_room(target: Target, room: int) -> None:
    """Too little for all that is sent, and too little for the files that it becomes."""
    agent = packed([(f"file{number}.py", b"x") for number in range(400)] + MEMBERS)
    size = 4096 * (room + 4)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "none", target.run], check=True)
    try:
        (target.run / "filler").write_bytes(bytes(size - 4096 * (room + 1)))
        if room == 0:
            (target.run / "rest").write_bytes(bytes(4096))
        word, status, said = target.ends(target.start(agent=agent), agent.data)
        assert (word, status) == ("SEND" if room else "", 72)
        assert said.startswith("No space left on device (1 KiB needed, ")
        assert target.names() == []
    finally:
        subprocess.run(["umount", target.run], check=True)


def test_a_place_where_nothing_can_be_executed(target: Target) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,mode=755", "none", target.run], check=True)
    try:
        assert target() == ("SEND", 0, FOUND)
        assert target() == ("HAVE", 0, FOUND)
    finally:
        subprocess.run(["umount", target.run], check=True)
