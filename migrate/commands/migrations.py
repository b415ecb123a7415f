"""pymigrate migrations: list the moves that this host took part in, newest last, and what they left behind.

With --watch: follow the moves out of this host that are under way.
"""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migrate.files.marks import Mark
    from migrate.journal.journal import DamagedJournal, Entry
    from migrate.target.image_cleanup import Left
    from runtime.state.lazy import Left as Missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", help="only moves of this container")
    parser.add_argument(
        "--watch", nargs="?", const="", metavar="ID",
        help="follow the moves out of this host that are under way, or that of one container, to their end",
    )  # fmt: skip
    parser.add_argument(
        "--clean",
        action="store_true",
        help="remove images and files that moves to this host left behind, unless they may be needed",
    )
    parser.add_argument(
        "--force", action="store_true", help="with --clean: also remove what may be the last copy of a container"
    )


def run(args: argparse.Namespace) -> int:
    from migrate.errors import UsageError
    from migrate.journal.journal import Entry, scan
    from migrate.target import image_cleanup, places

    if args.force and not args.clean:
        raise UsageError("--force needs --clean")
    if args.watch is not None:
        if args.clean or args.id:
            raise UsageError("--watch goes with neither --clean nor --id", remedy="--watch ID follows one container")
        return _watch(args)
    images = image_cleanup.left(args.id)
    files = [mark for mark in places.leftovers() if args.id in (None, mark.id)]
    if args.clean:
        _clean_files(files)
        return _clean(images, force=args.force)
    found = list(scan())
    moves = [entry.with_root(args.root) for entry in found if isinstance(entry, Entry) and args.id in (None, entry.id)]
    damaged = [entry for entry in found if not isinstance(entry, Entry)]
    damaged = [entry for entry in damaged if entry.entry is None or args.id in (None, entry.entry.id)]
    if args.json:
        _print_json(moves, damaged, images, files)
    else:
        _print_table(moves, images, files)
    for journal in damaged:
        print(f"pymigrate: warning: {journal}", file=sys.stderr)
        if journal.remedy:
            print(f"  {journal.remedy}", file=sys.stderr)
    return 0


def _watch(args: argparse.Namespace) -> int:
    from migrate.cli.error_report import printable
    from migrate.source import follow
    from migrate.ui import monitor
    from runtime.state.store import Store

    display = monitor(as_json=args.json, several=True)

    def ended(end: follow.End) -> None:
        if args.json:
            print(json.dumps(end.plain()), flush=True)
        else:
            display.close()
            print(printable(end.words()), flush=True)

    try:
        follow.follow(Store(args.root), args.watch or None, display, ended)
    finally:
        display.close()
    return 0


def _print_json(
    moves: "list[Entry]", damaged: "list[DamagedJournal]", images: "list[Left]", files: "list[Mark]"
) -> None:
    from migrate.journal import under_way
    from migrate.phases import workload
    from migrate.source import ask_later

    for entry in moves:
        fields = {"migration": entry.migration, "role": entry.role, "id": entry.id, "source": entry.source}
        fields |= {"target": entry.target, "phase": entry.phase, "workload": workload(entry.phase, entry.role)}
        fields |= {"started": entry.started, "updated": entry.updated}
        left = [mark.path for mark in files if mark.migration == entry.migration]
        described = [_described(item) for item in _of(images, entry.migration)]
        doing = {
            "under_way": under_way.is_under_way(entry.migration), "asking": ask_later.asker(entry.migration) != 0
        }  # fmt: skip
        missing = _missing(entry)
        memory = {} if missing is None else {"memory": missing.plain()}
        print(json.dumps({**fields, **doing, "images": described, "files": left, **memory}))
    for journal in damaged:
        migration = journal.path.stem
        known = {"id": journal.entry.id, "role": journal.entry.role} if journal.entry is not None else {}
        damage = {"path": str(journal.path), "line": journal.line, "reason": journal.reason}
        fields = {"migration": migration, **known, "workload": "UNKNOWN"}
        print(json.dumps({**fields, "damage": damage, "images": [_described(item) for item in _of(images, migration)]}))
    known_moves = {entry.migration for entry in moves} | {journal.path.stem for journal in damaged}
    for item in images:
        if item.found.migration not in known_moves:
            print(json.dumps({"migration": item.found.migration, "workload": "UNKNOWN", "images": [_described(item)]}))


def _missing(entry: "Entry") -> "Missing | None":
    """Return what is still missing of the memory of a container that a move has brought; None if nothing is."""
    from criu_rpc.errors import Error
    from migrate.phases import Phase
    from runtime.state import lazy
    from runtime.state.store import Store

    if entry.role != "target" or entry.phase is not Phase.RESUMED:
        return None
    try:
        state = Store(entry.root).look(entry.id)
    except Error:
        return None  # it is gone, or cannot be read, which `list` says
    return lazy.left(state) if state.move == entry.migration else None


def _of(images: "list[Left]", migration: str) -> "list[Left]":
    return [item for item in images if item.found.migration == migration]


def _described(item: "Left") -> dict[str, object]:
    found = item.found
    age = max(0, round(time.time() - found.since))
    return {
        "path": str(found.path), "place": found.kind, "bytes": found.size, "age_s": age,
        "may_be_last_copy": item.may_be_last, "in_use": item.in_use,
    }  # fmt: skip


def _print_table(moves: "list[Entry]", images: "list[Left]", files: "list[Mark]") -> None:
    from migrate.cli.error_report import printable
    from migrate.phases import workload
    from migrate.ui.text import age, size, table

    rows = [
        (
            found.migration,
            found.id,
            found.source,
            found.target,
            found.role,
            found.phase + _now(found),
            workload(found.phase, found.role),
            found.started,
        )
        for found in moves
    ]
    for line in table(("MIGRATION", "ID", "FROM", "TO", "ROLE", "PHASE", "WORKLOAD", "STARTED"), rows):
        print(line)
    if images:
        left = [
            (
                item.found.migration,
                item.entry.id if item.entry else "?",
                item.found.kind,
                size(item.found.size),
                age(time.time() - item.found.since),
                "in use" if item.in_use else "may be the last copy" if item.may_be_last else "not needed",
                str(item.found.path),
            )
            for item in images
        ]
        print()
        for line in table(("IMAGES OF", "ID", "IN", "SIZE", "AGE", "STATUS", "PATH"), left):
            print(line)
    if files:
        print()
        paths = [(mark.migration, mark.id, printable(mark.path)) for mark in files]
        for line in table(("FILES OF", "ID", "PATH"), paths):
            print(line)


def _now(entry: "Entry") -> str:
    """Return what a process of this host does for a move, in brackets; "" if there is none."""
    from migrate.journal import under_way
    from migrate.source import ask_later

    if under_way.is_under_way(entry.migration):
        return " (under way)"
    missing = _missing(entry)
    if missing is not None:
        return f" ({missing})"
    return " (asking)" if ask_later.asker(entry.migration) else ""


def _clean_files(files: "list[Mark]") -> None:
    """Remove the files that failed moves sent. The next move of the same container sends them again."""
    from migrate.cli.error_report import printable
    from migrate.target import places

    for mark in files:
        why = places.clean(mark)
        print(printable(f"{mark.id}, {mark.path}: {f'kept: {why}' if why else 'removed'}"))


def _clean(images: "list[Left]", *, force: bool) -> int:
    """Remove the images that nobody needs. Raises LastCopy if images remain that may be needed."""
    from migrate.target import image_cleanup
    from migrate.target.image_cleanup import LastCopy

    kept = []
    for item in images:
        name = f"{item.entry.id if item.entry else 'an unknown container'}, {item.found.path}"
        if item.in_use:
            print(f"{name}: kept: a move uses these images")
        elif item.may_be_last and not force:
            kept.append(item)
        else:
            if item.may_be_last:
                print(f"pymigrate: warning: {name}: this may have been the last copy of the container", file=sys.stderr)
            image_cleanup.remove(item)
            print(f"{name}: removed")
    if kept:
        raise LastCopy(kept)
    return 0
