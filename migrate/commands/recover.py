"""pymigrate recover ID: finish a move whose outcome is unknown, or repair a container after an interrupted dump."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    forced = parser.add_mutually_exclusive_group()
    forced.add_argument(
        "--force-source", action="store_true",
        help="at the source, if the target is gone for good: keep the container here, or declare it lost",
    )  # fmt: skip
    forced.add_argument(
        "--force-target", action="store_true",
        help="at the target, if the source is gone for good or has lost its journal: restore the container here",
    )  # fmt: skip
    forced.add_argument(
        "--forget", action="store_true", help="close the journal entry of the move and change nothing else"
    )


def run(args: argparse.Namespace) -> int:
    from migrate.cli.error_report import printable
    from migrate.source import force
    from migrate.source.recover import recover
    from runtime.state.store import Store

    action = recover
    if args.force_source:
        action = force.force_source
    elif args.force_target:
        from migrate.target.force_target import force_target

        action = force_target
    elif args.forget:
        action = force.forget
    print(printable(action(Store(args.root), args.id)))  # it quotes the other host
    return 0
