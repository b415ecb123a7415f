"""pymigrate cancel ID: cancel a move that is under way."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")


def run(args: argparse.Namespace) -> int:
    from migrate.cli.error_report import printable
    from migrate.source.cancel import cancel
    from runtime.state.store import Store

    print(printable(cancel(Store(args.root), args.id)))  # it quotes the other host
    return 0
