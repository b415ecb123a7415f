"""pymigrate migrations: the moves that this host has taken part in, newest last."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", help="only those of this container")


def run(args: argparse.Namespace) -> int:
    from migrate.journal import entries
    from migrate.phases import workload
    from migrate.ui.text import table

    moves = [entry for entry in entries() if args.id in (None, entry.id)]
    if args.json:
        for entry in moves:
            fields = {"migration": entry.migration, "role": entry.role, "id": entry.id, "source": entry.source}
            fields |= {"target": entry.target, "phase": entry.phase, "workload": workload(entry.phase)}
            print(json.dumps(fields | {"started": entry.started, "updated": entry.updated}))
        return 0
    rows = [
        (
            found.migration,
            found.id,
            found.source,
            found.target,
            found.role,
            found.phase,
            workload(found.phase),
            found.started,
        )
        for found in moves
    ]
    for line in table(("MIGRATION", "ID", "FROM", "TO", "ROLE", "PHASE", "WORKLOAD", "STARTED"), rows):
        print(line)
    return 0
