"""pymigrate run ID: create and start a container; in the foreground unless --detach."""

import argparse

from migrate.commands import create


def add_arguments(parser: argparse.ArgumentParser) -> None:
    create.add_arguments(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="return when it runs; `logs` shows its output")


def run(args: argparse.Namespace) -> int:
    from runtime import container
    from runtime.state import Store

    store = Store(args.root)
    if not args.detach:
        return container.run(store, args.id, args.bundle, pid_file=args.pid_file)
    container.create(store, args.id, args.bundle, pid_file=args.pid_file)
    try:
        container.start(store, args.id)
    except BaseException:
        container.delete(store, args.id, force=True)
        raise
    return 0
