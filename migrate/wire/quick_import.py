"""Import paramiko in 35 ms instead of 50.

It asks importlib.metadata for its own version. That module imports 40 others, of which nothing else here needs one. The
name of a directory beside paramiko's has the version as well.
"""

import contextlib
import importlib.util
import os
import sys
from types import ModuleType

_METADATA = "importlib.metadata"


def import_paramiko() -> None:
    """Import it if that is possible. A failure is raised where it is imported next."""
    if _METADATA in sys.modules or "paramiko" in sys.modules or not (version := _version()):
        return
    stand_in = ModuleType(_METADATA)
    stand_in.version = lambda _name: version  # type: ignore[attr-defined]
    sys.modules[_METADATA] = stand_in
    try:
        with contextlib.suppress(ImportError, AttributeError):
            import paramiko  # noqa: F401
    finally:
        del sys.modules[_METADATA]


def _version() -> str:
    """Return paramiko's version, "" if only importlib.metadata can find it."""
    spec = importlib.util.find_spec("paramiko")
    if spec is None or spec.origin is None:
        return ""
    beside = os.path.dirname(os.path.dirname(spec.origin))
    found = [name for name in os.listdir(beside) if name.startswith("paramiko-") and name.endswith(".dist-info")]
    return found[0].removeprefix("paramiko-").removesuffix(".dist-info") if len(found) == 1 else ""
