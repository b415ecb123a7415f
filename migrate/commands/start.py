"""pymigrate start ID: let a created container run its program."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")


def run(args: argparse.Namespace) -> int:
    from runtime import container
    from runtime.state import Store

    container.start(Store(args.root), args.id)
    return 0
