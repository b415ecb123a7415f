"""pymigrate move ID HOST: move a running container to another host."""

import argparse

from migrate.cli import move_arguments
from migrate.model import FREEZE_TIMEOUT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("host", help="[USER@]HOST, as ssh knows it")
    move_arguments.add_arguments(parser)
    parser.add_argument(
        "--timeout", type=move_arguments.seconds, default=FREEZE_TIMEOUT, metavar="SECONDS",
        help=f"roll back when the container has been frozen this long (default {FREEZE_TIMEOUT:.0f})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from migrate.source.move import move
    from migrate.ui import monitor
    from runtime.state.store import Store

    display = monitor(as_json=args.json)
    try:
        move(Store(args.root), move_arguments.wanted(args, timeout=args.timeout), display)
    finally:
        display.close()
    return 0
