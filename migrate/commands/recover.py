"""pymigrate recover ID: finish a move whose end is not known, or undo a dump that was cut short."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")


def run(args: argparse.Namespace) -> int:
    from migrate.recovery import recover
    from runtime.state import Store

    print(recover(Store(args.root), args.id))
    return 0
