"""pymigrate recover ID: finish a move whose end is not known."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")


def run(args: argparse.Namespace) -> int:
    from migrate.phases import Phase
    from migrate.recovery import recover
    from runtime.state import Store

    entry = recover(Store(args.root), args.id)
    print(f"{entry.id}: runs at {entry.target if entry.phase is Phase.RESUMED else entry.source}")
    return 0
