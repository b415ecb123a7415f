"""The agent as it is sent."""

import marshal
import zlib

from migrate.wire.agent_zip import AgentZip


def test_the_same_code_makes_the_same_agent() -> None:
    agent = AgentZip.build()
    assert AgentZip.build() == agent
    members = dict(marshal.loads(zlib.decompress(agent.data)))
    assert {"__main__.py", "migrate/target/agent.py", "pycriu/rpc_pb2.py", "google/__init__.py"} <= members.keys()
    assert agent.unpacked == sum(map(len, members.values()))
    assert all(name.endswith(".py") and not name.startswith("/") and ".." not in name for name in members)
