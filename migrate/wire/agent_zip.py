"""The agent as one file: our code, pure-Python protobuf and CRIU's messages in a zipapp made in memory.

The target needs python3 and criu, nothing else. The same code always makes the same bytes, so the SHA-256 names
the agent and a target that has it already is not sent it again. The verbs are in it too: whoever logs in at the target
must be able to look after the container.
"""

import hashlib
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from criu_rpc import messages
from migrate.errors import MigrateError

_MAIN = """
import sys
if __name__ == "__main__":
    from migrate.wire import zip_cache
    zip_cache.use()
    if sys.argv[1:] != ["agent"]:
        from migrate.cli import main
        sys.exit(main())
    from migrate.target.agent import main
    sys.exit(main())
"""
_LEFT_OUT = ("migrate/lab/", "migrate/demo", "migrate/commands/lab", "migrate/commands/demo")
# What runtime/network/netlink.py imports of pyroute2.
_PYROUTE2 = (
    "common.py", "config/__init__.py", "netlink/__init__.py", "netlink/exceptions.py", "netlink/rtnl/__init__.py",
    "netlink/rtnl/ifaddrmsg.py", "netlink/rtnl/iw_event.py", "netlink/rtnl/ndmsg.py", "netlink/rtnl/rtmsg.py",
    "netlink/rtnl/ifinfmsg/*.py", "netlink/rtnl/ifinfmsg/plugins/*.py",
)  # fmt: skip
_PROTOBUF_LEFT_OUT = ("google/protobuf/compiler/", "google/protobuf/testdata/", "google/protobuf/util/")


@dataclass(frozen=True)
class AgentZip:
    """The bytes of the zipapp and their SHA-256 in hex."""

    data: bytes
    digest: str

    @classmethod
    def build(cls) -> Self:
        """Pack this very code. Raises MigrateError when protobuf's Python files are not where they should be."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(_members()):
                info = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, data)
        data = packed.getvalue()
        return cls(data, hashlib.sha256(data).hexdigest())


def _members() -> Iterator[tuple[str, bytes]]:
    yield "__main__.py", _MAIN.lstrip().encode()
    top = Path(__file__).resolve().parents[2]
    for package in ("migrate", "runtime", "criu_rpc"):
        for path in (top / package).rglob("*.py"):
            name = path.relative_to(top).as_posix()
            if not name.startswith(_LEFT_OUT):
                yield name, path.read_bytes()
    jeepney = importlib.util.find_spec("jeepney")  # for a container that systemd made the cgroup of
    if jeepney is not None and jeepney.origin is not None:
        library = Path(jeepney.origin).parent
        for path in library.rglob("*.py"):
            if "tests" not in path.parts:
                yield f"jeepney/{path.relative_to(library).as_posix()}", path.read_bytes()
    yield from _pyroute2()
    yield "pycriu/__init__.py", b""
    yield "pycriu/rpc_pb2.py", messages.source("rpc_pb2").read_bytes()
    # A regular package, so that the one in the zip wins over any the host has.
    yield "google/__init__.py", b""
    spec = importlib.util.find_spec("google.protobuf")
    if spec is None or spec.origin is None:
        raise MigrateError("protobuf is not installed", remedy="pip install protobuf")
    protobuf = Path(spec.origin).parent
    if not (protobuf / "internal" / "python_message.py").exists():
        raise MigrateError(f"{protobuf} holds no pure-Python protobuf, which the agent needs")
    for path in protobuf.rglob("*.py"):
        name = "google/protobuf/" + path.relative_to(protobuf).as_posix()
        if not name.startswith(_PROTOBUF_LEFT_OUT) and not name.endswith("_test.py"):
            yield name, path.read_bytes()


def _pyroute2() -> Iterator[tuple[str, bytes]]:
    """For a container with a network of its own on a bridge."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or spec.origin is None:
        raise MigrateError("pyroute2 is not installed", remedy="pip install 'pyroute2>=0.9,<0.10'")
    library = Path(spec.origin).parent
    yield "pyroute2/__init__.py", b""
    for pattern in _PYROUTE2:
        for path in library.glob(pattern):
            yield f"pyroute2/{path.relative_to(library).as_posix()}", path.read_bytes()
