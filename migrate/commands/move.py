"""pymigrate move ID HOST: move a running container to another host."""

import argparse
import dataclasses

from migrate.cli import move_arguments
from migrate.model import FREEZE_TIMEOUT, MAX_DOWNTIME, MAX_ROUNDS, MigrationMode, OnDivergence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("host", help="[USER@]HOST, as ssh knows it")
    move_arguments.add_arguments(parser)
    parser.add_argument(
        "--mode", choices=[str(mode) for mode in MigrationMode], default=MigrationMode.AUTO,
        help="send memory while the container runs, or while it is frozen (auto: pre-copy where it is possible)",
    )  # fmt: skip
    parser.add_argument(
        "--max-downtime", type=move_arguments.seconds, default=MAX_DOWNTIME, metavar="SECONDS",
        help=f"send memory in rounds until the container need not be frozen longer (default {MAX_DOWNTIME:g})",
    )  # fmt: skip
    parser.add_argument(
        "--max-rounds",
        type=move_arguments.rounds,
        default=MAX_ROUNDS,
        metavar="N",
        help=f"freeze the container after N rounds at the latest (default {MAX_ROUNDS})",
    )
    parser.add_argument(
        "--on-divergence", choices=[str(choice) for choice in OnDivergence], default=OnDivergence.SWITCH_OVER,
        help="what to do when the container writes memory faster than it can be sent (default switch-over)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=move_arguments.seconds, default=FREEZE_TIMEOUT, metavar="SECONDS",
        help=f"roll back when the container has been frozen this long (default {FREEZE_TIMEOUT:.0f})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from migrate.source.move import move
    from migrate.ui import monitor
    from runtime.state.store import Store

    wanted = dataclasses.replace(
        move_arguments.wanted(args, timeout=args.timeout), mode=MigrationMode(args.mode),
        max_downtime=args.max_downtime, max_rounds=args.max_rounds, on_divergence=OnDivergence(args.on_divergence),
    )  # fmt: skip
    display = monitor(as_json=args.json)
    try:
        move(Store(args.root), wanted, display)
    finally:
        display.close()
    return 0
