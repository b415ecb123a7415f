"""The agent as it is sent."""

import marshal
import zlib
from pathlib import Path

import pytest

from migrate.wire import agent_zip
from migrate.wire.agent_zip import AgentZip


def test_the_same_code_makes_the_same_agent() -> None:
    agent = AgentZip.build()
    assert AgentZip.build() == agent
    members = dict(marshal.loads(zlib.decompress(agent.data)))
    assert {"__main__.py", "migrate/target/agent.py", "pycriu/rpc_pb2.py", "google/__init__.py"} <= members.keys()
    assert agent.unpacked == sum(map(len, members.values()))
    assert all(name.endswith(".py") and not name.startswith("/") and ".." not in name for name in members)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one module of an agent."""
    file = tmp_path / "code" / "module.py"
    file.parent.mkdir()
    file.write_bytes(b"first")
    monkeypatch.setattr(agent_zip, "_members", lambda: [("module.py", file), ("empty.py", b"")])
    return file


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Where the agent is kept."""
    return tmp_path / "packed-agent"


def test_a_kept_agent_is_not_packed_again(code: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = AgentZip.load(kept)
    assert agent == AgentZip.build()
    monkeypatch.setattr(agent_zip.zlib, "compress", None)
    assert AgentZip.load(kept) == agent


def test_a_change_of_the_code_changes_a_kept_agent(code: Path, kept: Path) -> None:
    agent = AgentZip.load(kept)
    code.write_bytes(b"later")  # as long as before
    assert AgentZip.load(kept) == AgentZip.build() != agent


@pytest.mark.parametrize("damage", [b"", b"\xff", marshal.dumps((b"", b"")), marshal.dumps(7)])
def test_a_damaged_kept_agent_is_packed_again(code: Path, kept: Path, damage: bytes) -> None:
    agent = AgentZip.load(kept)
    kept.write_bytes(damage)
    assert AgentZip.load(kept) == agent
    assert kept.read_bytes() != damage


def test_an_agent_that_others_could_change_is_not_used(code: Path, kept: Path) -> None:
    agent = AgentZip.load(kept)
    stamp, _, unpacked = marshal.loads(kept.read_bytes())
    kept.write_bytes(marshal.dumps((stamp, b"theirs", unpacked)))
    kept.chmod(0o666)
    assert AgentZip.load(kept) == agent
