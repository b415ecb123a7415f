"""The arguments that `move` and `validate` share: they decide whether and how a container can move."""

import argparse
import re
from typing import TYPE_CHECKING

from migrate.model import FREEZE_TIMEOUT, MAX_FREEZE_TIMEOUT, MAX_STREAMS

if TYPE_CHECKING:
    from migrate.model import MigrationSpec

_RATE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([KMG]?)", re.IGNORECASE)
_SLOWEST, _FASTEST = 1 << 10, 1 << 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow", action="append", default=[], metavar="RULE", help="lift a rule of `pymigrate validate` (repeatable)"
    )
    parser.add_argument(
        "--volume", action="append", default=[], metavar="PATH=copy|shared|NEWPATH",
        help="the volume at PATH: send it along, or use what the target has at the same or another path (repeatable)",
    )  # fmt: skip
    parser.add_argument("--net", metavar="bridge=NAME", help="the bridge at the target, if it has another name there")
    parser.add_argument(
        "--tcp-close", action="store_true",
        help="close the container's TCP connections, for a target in another network; its peers are not told",
    )  # fmt: skip


def seconds(text: str) -> float:
    """Return how long a container may be frozen, in seconds (an argparse type)."""
    value = float(text)
    if not 0 < value <= MAX_FREEZE_TIMEOUT:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most {MAX_FREEZE_TIMEOUT:.0f}")
    return value


def rate(text: str) -> int:
    """Return bytes per second, from a number with or without K, M or G: powers of 1024 (an argparse type)."""
    found = _RATE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text}: must be bytes per second, such as 500K, 50M or 1.5G")
    value = float(found[1]) * 1024 ** ("", "K", "M", "G").index(found[2].upper())
    if not _SLOWEST <= value <= _FASTEST:
        raise argparse.ArgumentTypeError(f"{text}: must be between 1K and 1024G; without the option there is no limit")
    return int(value)


def rounds(text: str) -> int:
    """Return a number of rounds (an argparse type)."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 2")
    return value


def streams(text: str) -> int:
    """Return a number of connections (an argparse type)."""
    value = int(text)
    if not 1 <= value <= MAX_STREAMS:
        raise argparse.ArgumentTypeError(f"{text}: must be between 1 and {MAX_STREAMS}")
    return value


def wanted(args: argparse.Namespace, container_id: str, timeout: float = FREEZE_TIMEOUT) -> "MigrationSpec":
    """Return the move of one container that a command line asks for. Raises UsageError."""
    from migrate.model import MigrationSpec

    volumes = {}
    if args.volume:
        from migrate.preflight.volumes import parse  # 40 ms

        volumes = parse(args.volume)
    return MigrationSpec(
        container_id, args.host or "", frozenset(args.allow), timeout=timeout, net=args.net, tcp_close=args.tcp_close,
        volumes=volumes,
    )  # fmt: skip
