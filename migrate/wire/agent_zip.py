"""The agent as one message: our code, pure-Python protobuf and CRIU's messages, compressed.

The message is a marshalled list of names and contents, because the first stage unpacks that in 12 ms. Unpacking a zip
file takes 24 ms, and importing zipfile another 15 ms. The target needs only python3 and criu. The same code always
makes the same bytes, so the SHA-256 names the agent, and a target that has it already does not receive it again. The
verbs are in it too, so that a user who logs in at the target can look after the container.
"""

import contextlib
import hashlib
import importlib.util
import marshal
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from criu_rpc import messages
from migrate.errors import MigrateError
from migrate.paths import PACKED_AGENT
from runtime.linux import files, trusted

_MAIN = """
import os, sys
if __name__ == "__main__":
    # The place itself, because the name of the command line may name another version later.
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    if sys.argv[1:2] == ["stream"]:
        from migrate.target.stream import main
        sys.exit(main(sys.argv[2:]))
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
        return cls._pack(sorted(_members()))

    @classmethod
    def load(cls, place: Path = PACKED_AGENT) -> Self:
        """Return what `build` does; keep it in the file `place`, which saves 90 ms until a file of the code changes."""
        members = sorted(_members())
        stamp = hashlib.sha256(repr([(name, _version(content)) for name, content in members]).encode()).digest()
        with contextlib.suppress(OSError, ValueError, EOFError, TypeError):
            os.close(trusted.make_directory(str(place.parent)))
            with open(trusted.open_file(str(place)), "rb") as file:
                of, data, unpacked = marshal.load(file)
            if of == stamp:
                return cls(data, hashlib.sha256(data).hexdigest(), unpacked)
        agent = cls._pack(members)
        with contextlib.suppress(OSError):
            files.replace(str(place), marshal.dumps((stamp, agent.data, agent.unpacked)))
        return agent

    @classmethod
    def _pack(cls, members: "list[tuple[str, Path | bytes]]") -> Self:
        read = [(name, content if isinstance(content, bytes) else content.read_bytes()) for name, content in members]
        # Later versions of the format depend on how often an object is referenced.
        data = zlib.compress(marshal.dumps(read, 2))
        return cls(data, hashlib.sha256(data).hexdigest(), sum(len(content) for _, content in read))


def _version(content: Path | bytes) -> object:
    """Return what changes when a member does, without reading its file."""
    if isinstance(content, bytes):
        return content
    info = content.stat()
    return str(content), info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _members() -> Iterator[tuple[str, Path | bytes]]:
    """Yield the name of each member, and its file or its contents."""
    yield "__main__.py", _MAIN.lstrip().encode()
    top = Path(__file__).resolve().parents[2]
    for package in ("migrate", "runtime", "criu_rpc"):
        for name, path in _modules(top, package):
            if not name.startswith(_LEFT_OUT):
                yield name, path
    jeepney = importlib.util.find_spec("jeepney")  # for a container whose cgroup systemd made
    if jeepney is not None and jeepney.origin is not None:
        for name, path in _modules(Path(jeepney.origin).parents[1], "jeepney"):
            if "tests" not in path.parts:
                yield name, path
    yield from _pyroute2()
    yield "pycriu/__init__.py", b""
    yield "pycriu/rpc_pb2.py", messages.source("rpc_pb2")
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
    for name, path in _modules(protobuf.parents[1], "google/protobuf"):
        if not name.startswith(_PROTOBUF_LEFT_OUT) and not name.endswith("_test.py"):
            yield name, path


def _modules(top: Path, package: str) -> Iterator[tuple[str, Path]]:
    """Yield the name, relative to `top`, and the file of each module of a package."""
    for directory, _, names in os.walk(top / package):
        inner = os.path.relpath(directory, top)
        for name in names:
            if name.endswith(".py"):
                yield f"{inner}/{name}", Path(directory, name)


def _pyroute2() -> Iterator[tuple[str, Path | bytes]]:
    """The modules that a container on a bridge needs."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or spec.origin is None:
        raise MigrateError("pyroute2 is not installed", remedy="pip install 'pyroute2>=0.9,<0.10'")
    library = Path(spec.origin).parent
    yield "pyroute2/__init__.py", b""
    for pattern in _PYROUTE2:
        for path in library.glob(pattern):
            yield f"pyroute2/{path.relative_to(library).as_posix()}", path
