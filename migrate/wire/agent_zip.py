"""The agent as one message: our code, pure-Python protobuf and CRIU's messages, compressed.

The message is a marshalled list of names and contents, because the first stage unpacks that in 12 ms. Unpacking a zip
file takes 24 ms, and importing zipfile another 15 ms. The target needs only python3 and criu. The same code always
makes the same bytes, so the SHA-256 names the agent, and a target that has it already does not receive it again. The
verbs are in it too, so that a user who logs in at the target can look after the container.
"""

import hashlib
import importlib.util
import marshal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from criu_rpc import messages
from migrate.errors import MigrateError

_MAIN = """
import os, sys
if __name__ == "__main__":
    # The place itself, because the name of the command line may name another version later.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    if sys.argv[1:] != ["agent"]:
        from migrate.cli import main
        sys.exit(main())
    from migrate.target.agent import main
    sys.exit(main())
"""
_LEFT_OUT = ("migrate/lab/", "migrate/demo", "migrate/commands/lab", "migrate/commands/demo")
# The modules of pyroute2 that runtime/network/netlink.py imports.
_PYROUTE2 = (
    "common.py", "config/__init__.py", "netlink/__init__.py", "netlink/exceptions.py", "netlink/rtnl/__init__.py",
    "netlink/rtnl/ifaddrmsg.py", "netlink/rtnl/iw_event.py", "netlink/rtnl/ndmsg.py", "netlink/rtnl/rtmsg.py",
    "netlink/rtnl/ifinfmsg/*.py", "netlink/rtnl/ifinfmsg/plugins/*.py",
)  # fmt: skip
_PROTOBUF_LEFT_OUT = ("google/protobuf/compiler/", "google/protobuf/testdata/", "google/protobuf/util/")


@dataclass(frozen=True)
class AgentZip:
    """The compressed bytes, their SHA-256 in hex, and the size of the files that they hold."""

    data: bytes
    digest: str
    unpacked: int

    @classmethod
    def build(cls) -> Self:
        """Pack the running code. Raises MigrateError when the Python files of protobuf or pyroute2 are missing."""
        members = sorted(_members())
        # Later versions of the format depend on how often an object is referenced.
        data = zlib.compress(marshal.dumps(members, 2))
        return cls(data, hashlib.sha256(data).hexdigest(), sum(len(content) for _, content in members))


def _members() -> Iterator[tuple[str, bytes]]:
    yield "__main__.py", _MAIN.lstrip().encode()
    top = Path(__file__).resolve().parents[2]
    for package in ("migrate", "runtime", "criu_rpc"):
        for path in (top / package).rglob("*.py"):
            name = path.relative_to(top).as_posix()
            if not name.startswith(_LEFT_OUT):
                yield name, path.read_bytes()
    jeepney = importlib.util.find_spec("jeepney")  # for a container whose cgroup systemd made
    if jeepney is not None and jeepney.origin is not None:
        library = Path(jeepney.origin).parent
        for path in library.rglob("*.py"):
            if "tests" not in path.parts:
                yield f"jeepney/{path.relative_to(library).as_posix()}", path.read_bytes()
    yield from _pyroute2()
    yield "pycriu/__init__.py", b""
    yield "pycriu/rpc_pb2.py", messages.source("rpc_pb2").read_bytes()
    # A regular package, so that this one takes precedence over one that the host has.
    yield "google/__init__.py", b""
    spec = importlib.util.find_spec("google.protobuf")
    if spec is None or spec.origin is None:
        raise MigrateError("protobuf is not installed", remedy="pip install protobuf")
    protobuf = Path(spec.origin).parent
    if not (protobuf / "internal" / "python_message.py").exists():
        raise MigrateError(
            f"{protobuf} does not have the pure-Python protobuf, which the agent needs",
            remedy="pip install --force-reinstall protobuf",
        )
    for path in protobuf.rglob("*.py"):
        name = "google/protobuf/" + path.relative_to(protobuf).as_posix()
        if not name.startswith(_PROTOBUF_LEFT_OUT) and not name.endswith("_test.py"):
            yield name, path.read_bytes()


def _pyroute2() -> Iterator[tuple[str, bytes]]:
    """The modules that a container on a bridge needs."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or spec.origin is None:
        raise MigrateError("pyroute2 is not installed", remedy="pip install 'pyroute2>=0.9,<0.10'")
    library = Path(spec.origin).parent
    yield "pyroute2/__init__.py", b""
    for pattern in _PYROUTE2:
        for path in library.glob(pattern):
            yield f"pyroute2/{path.relative_to(library).as_posix()}", path.read_bytes()
