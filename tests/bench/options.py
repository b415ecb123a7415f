"""The options of the benchmark of memory."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tests.bench.links import LINKS
from tests.bench.ways import WAYS

MEMORY, DIRTY = [16, 256, 1024, 4096], [0.0, 50.0]
SNAPSHOT, CONTAINERS = 1024, 20  # MiB of the container that is saved; how many small ones move
PARTS = ("moves", "snapshots", "several")
_LINKS = {link.key: link.key for link in LINKS}
_WAYS = {way.key: way for way in WAYS}
_PARTS = {part: part for part in PARTS}
T = TypeVar("T")


def _numbers(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return an argparse type: numbers with commas between them."""

    def read(words: str) -> list[T]:
        try:
            return [kind(word) for word in words.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{words}: not numbers with commas between them") from None

    return read


def _keys(named: Mapping[str, T]) -> Callable[[str], list[T]]:
    """Return an argparse type: keys of a table, with commas between them."""

    def read(words: str) -> list[T]:
        try:
            return [named[word] for word in words.split(",")]
        except KeyError as error:
            raise argparse.ArgumentTypeError(f"{error.args[0]}: not one of {', '.join(named)}") from None

    return read


def parse(text: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's wishes, with every default filled in. `text`: what the benchmark does."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.memory", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-n", "--rounds", type=int, help="(default 5)")
    add("--memory", type=_numbers(int), metavar="MIB,...", help="sizes of containers")
    add("--dirty", type=_numbers(float), metavar="RATE,...", help="MiB/s that they write")
    add("--link", dest="links", type=_keys(_LINKS), metavar="LINK,...", help=", ".join(_LINKS))
    ways = "; ".join(f"{way.key}: {way.text}" for way in WAYS)
    add("--only", dest="ways", type=_keys(_WAYS), metavar="WAY,...", help=ways)
    add("--parts", type=_keys(_PARTS), metavar="PART,...", help=", ".join(PARTS))
    add("--quick", action="store_true", help="one round of 16 and 256 MiB, unshaped; a smaller snapshot")
    add("-o", "--output", type=Path, metavar="DIR", help="write bench-memory.json and bench-memory.svg there")
    add("--draw", type=Path, metavar="FILE", help="measure nothing: read a bench-memory.json")
    wanted = parser.parse_args(argv)
    quick = wanted.quick
    wanted.snapshot, wanted.containers = (256, 5) if quick else (SNAPSHOT, CONTAINERS)
    wanted.rounds = (1 if quick else 5) if wanted.rounds is None else wanted.rounds
    wanted.memory = wanted.memory or MEMORY[: 2 if quick else None]
    wanted.dirty = wanted.dirty or DIRTY
    wanted.links = wanted.links or list(_LINKS)[: 1 if quick else None]
    wanted.ways = wanted.ways or list(WAYS)
    wanted.parts = wanted.parts or list(PARTS)
    if wanted.rounds < 1 or min(wanted.memory) < 1 or min(wanted.dirty) < 0:
        parser.error("rounds and sizes must be at least 1, rates at least 0")
    if wanted.output and not wanted.output.is_dir():
        parser.error(f"{wanted.output} is not a directory")
    return wanted
