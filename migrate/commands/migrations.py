"""pymigrate migrations: the moves that this host has taken part in, newest last."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", help="only those of this container")


def run(args: argparse.Namespace) -> int:
    from migrate.journal import entries
    from migrate.phases import workload

    found = [entry for entry in entries() if args.id in (None, entry.id)]
    if args.json:
        for entry in found:
            fields = {"migration": entry.migration, "role": entry.role, "id": entry.id, "source": entry.source}
            fields |= {"target": entry.target, "phase": entry.phase, "workload": workload(entry.phase)}
            print(json.dumps(fields | {"started": entry.started, "updated": entry.updated}))
        return 0
    rows = [("MIGRATION", "ID", "FROM", "TO", "ROLE", "PHASE", "WORKLOAD", "STARTED")]
    for entry in found:
        where = workload(entry.phase)
        rows.append(
            (entry.migration, entry.id, entry.source, entry.target, entry.role, entry.phase, where, entry.started)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
