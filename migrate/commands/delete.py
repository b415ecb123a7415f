"""pymigrate delete ID: remove a stopped container, or any with --force."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("-f", "--force", action="store_true", help="kill it first if it runs; it may also not exist")


def run(args: argparse.Namespace) -> int:
    from runtime import container
    from runtime.state import Store

    container.delete(Store(args.root), args.id, force=args.force)
    return 0
