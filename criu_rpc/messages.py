"""CRIU's protobuf messages: pycriu's `rpc_pb2`, loaded without the rest of pycriu, which is slow.

It is looked for as a module of a `pycriu` package on sys.path (the agent has one), in /opt/pymigrate/lib (where
provisioning puts it beside pymigrate's own CRIU) and in /usr/lib/python3/dist-packages (Debian's python3-pycriu or
criu).
"""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from criu_rpc.errors import CriuNotFound

_PLACES = (Path("/opt/pymigrate/lib/pycriu"), Path("/usr/lib/python3/dist-packages/pycriu"))


def source(name: str) -> Path:
    """Return the file of a generated module ("rpc_pb2", "stats_pb2"). Raises CriuNotFound."""
    for directory in (*(Path(entry) / "pycriu" for entry in sys.path), *_PLACES):
        path = directory / f"{name}.py"
        if path.is_file():
            return path
    raise CriuNotFound(
        f"pycriu's {name} is not installed", remedy="install python3-pycriu, or run vagrant/provision.sh"
    )


@functools.cache
def module(name: str) -> ModuleType:
    """Load a generated module alone. Raises CriuNotFound."""
    path = source(name)
    spec = importlib.util.spec_from_file_location(f"pycriu_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except ImportError as error:
        raise CriuNotFound(f"{path} cannot be loaded: {error}", remedy="pip install protobuf") from None
    return loaded


def rpc() -> Any:
    """The messages of CRIU's RPC: criu_req, criu_resp, criu_opts and their enums."""
    return module("rpc_pb2")
