"""Bundles of containers that come in: one that lies here already, or a place for a new one."""

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from migrate import treestore
from migrate.errors import MigrateError, ProtocolError
from migrate.files import fingerprint
from migrate.hostfacts import DATA
from migrate.trees import Owner
from runtime import departed


def parse_config(text: str) -> dict[str, Any]:
    """The config.json that came over the wire. Raises ProtocolError."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"the config.json that came is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("root"), dict):
        raise ProtocolError("the config.json that came has no root")
    return config


def find(hints: Iterable[str], config: dict[str, Any], expected: str, owner: Owner) -> tuple[Path, Path] | None:
    """The first bundle of `hints` with the same config (but for root.path) and root file system, and where that lies.

    `expected` is the fingerprint of the latter. One that the container may write to has none (""); it must be this
    container's, left here by a move.
    """
    for hint in hints:
        rootfs = _matching(Path(hint), config, expected, owner)
        if rootfs is not None:
            return Path(hint), rootfs
    return None


def _matching(bundle: Path, config: dict[str, Any], expected: str, owner: Owner) -> Path | None:
    if not bundle.is_absolute() or ".." in bundle.parts or departed.is_marked(str(bundle)):
        return None
    try:
        here = json.loads((bundle / "config.json").read_bytes())
        rootfs: Path = bundle / here["root"]["path"]
        here["root"]["path"] = config["root"].get("path")
        if here != config:
            return None
        same = fingerprint(rootfs) == expected if expected else treestore.is_ours(os.path.realpath(rootfs), owner)
        return rootfs.resolve() if same else None
    except (OSError, ValueError, KeyError, TypeError, MigrateError):
        return None


def free_place(container: str, owner: Owner, *, writable: bool) -> Path:
    """Where the bundle is put: never over one that a container of the same name may have written to."""
    for number in itertools.count(1):
        place = DATA / "bundles" / (container if number == 1 else f"{container}.{number}")
        if not os.path.lexists(place) or _is_replaceable(place, owner, writable=writable):
            return place
    raise AssertionError


def _is_replaceable(bundle: Path, owner: Owner, *, writable: bool) -> bool:
    try:
        root = json.loads((bundle / "config.json").read_bytes())["root"]
        rootfs = os.path.realpath(bundle / root["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if writable:
        return treestore.is_ours(rootfs, owner)
    return bool(root.get("readonly")) and treestore.mark_of(rootfs) is None
