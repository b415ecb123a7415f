"""pymigrate move ID... HOST: move running containers to another host."""

import argparse
import contextlib
import json
from typing import TYPE_CHECKING

from migrate.cli import move_arguments
from migrate.model import FREEZE_TIMEOUT, MAX_DOWNTIME, MAX_ROUNDS, Compression, MigrationMode, OnDivergence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate.model import MigrationSpec
    from migrate.source.several import Outcome
    from migrate.ui.page import Recorder
    from migrate.wire.ahead import Ahead

INTERMIXED = True  # options may stand between the containers
_KINDS = {"lost": "lost", "in-doubt": "in doubt", "moved-dirty": "moved, but the clean-up is incomplete"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="+", help="the container, or several")
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
        help="what to do when the container writes memory faster than it can be sent (default switch-over: freeze it "
        "anyway; throttle: give it less processor time before that)",
    )  # fmt: skip
    parser.add_argument(
        "--compress", choices=[str(choice) for choice in Compression], default=Compression.AUTO,
        help="compress memory on its way (auto: where that saves time)",
    )  # fmt: skip
    parser.add_argument(
        "--bandwidth-limit", type=move_arguments.rate, metavar="RATE",
        help="send no more than RATE bytes per second (as 500K, 50M, 1G) while the container runs",
    )  # fmt: skip
    parser.add_argument(
        "--streams", type=move_arguments.streams, default=1, metavar="N",
        help="send memory over N connections at once while the container runs (default 1; more help over a long "
        "distance, or where a processor is slower than the network)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=move_arguments.seconds, default=FREEZE_TIMEOUT, metavar="SECONDS",
        help=f"roll back when the container has been frozen this long (default {FREEZE_TIMEOUT:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true", help="move nothing: measure for two seconds, and say how the move would go"
    )
    parser.add_argument(
        "--report", metavar="FILE", help="afterwards write a page about the move (FILE.html), or its picture (FILE.svg)"
    )


def run(args: argparse.Namespace) -> int:
    from migrate.errors import UsageError

    if twice := {name for name in args.id if args.id.count(name) > 1}:
        raise UsageError(f"container {min(twice)} is named twice")
    wanted = [_wanted(args, name) for name in args.id]
    if args.streams > 1 and args.mode == MigrationMode.STOP_AND_COPY:
        raise UsageError("--streams is about memory that is sent ahead, and --mode stop-and-copy sends none")
    if args.plan:
        if args.streams > 1:
            raise UsageError("--plan measures one connection, so that --streams has no effect on it")
        if args.report is not None:
            raise UsageError("--plan moves nothing, so there is nothing for --report to show")
        return _plan(args, wanted)
    with _connecting(args, wanted) as ahead, _recorded(args) as recorder:
        return _several(args, wanted, recorder) if len(wanted) > 1 else _one(args, wanted[0], recorder, ahead)


@contextlib.contextmanager
def _connecting(args: argparse.Namespace, wanted: "list[MigrationSpec]") -> "Iterator[Ahead | None]":
    """Yield the connection for a single container that exists. It is made while the rest of the code is imported."""
    from runtime.state.store import Store

    if len(wanted) > 1 or wanted[0].id not in Store(args.root).ids():
        yield None
        return
    from migrate.wire.ahead import Ahead

    with Ahead(wanted[0].host, args.root) as ahead:
        yield ahead


@contextlib.contextmanager
def _recorded(args: argparse.Namespace) -> "Iterator[Recorder]":
    """Yield the monitor of the moves, and write the report afterwards. A report that fails is only a warning."""
    from criu_rpc.errors import Error
    from migrate.ui import monitor, page
    from runtime import notices

    path = page.check_place(args.report) if args.report is not None else None
    recorder = page.Recorder(monitor(as_json=args.json, several=len(args.id) > 1))
    try:
        yield recorder
    except Error as error:
        if len(args.id) == 1:
            recorder.failed(args.id[0], error)
        raise
    finally:
        recorder.close()
        if path is not None:
            try:
                page.write(path, recorder)
            except (Error, OSError) as problem:
                notices.warn(f"the report is not written: {getattr(problem, 'strerror', None) or problem}: {path}")


def _wanted(args: argparse.Namespace, container_id: str) -> "MigrationSpec":
    return move_arguments.wanted(args, container_id, timeout=args.timeout).replace(
        mode=MigrationMode(args.mode),
        max_downtime=args.max_downtime, max_rounds=args.max_rounds, on_divergence=OnDivergence(args.on_divergence),
        compress=Compression(args.compress), bandwidth_limit=args.bandwidth_limit,
        streams=args.streams,
    )  # fmt: skip


def _plan(args: argparse.Namespace, wanted: "list[MigrationSpec]") -> int:
    from migrate.source.plan import plan
    from migrate.ui import monitor
    from runtime.state.store import Store

    display = monitor(as_json=args.json, several=len(wanted) > 1)
    try:
        for spec in wanted:
            plan(Store(args.root), spec, display)
    finally:
        display.close()
    return 0


def _one(args: argparse.Namespace, wanted: "MigrationSpec", recorder: "Recorder", ahead: "Ahead | None") -> int:
    from migrate.source.move import move
    from runtime.state.store import Store

    move(Store(args.root), wanted, recorder, ahead)
    return 0


def _several(args: argparse.Namespace, wanted: "list[MigrationSpec]", recorder: "Recorder") -> int:
    """Report each failure when it happens, and in the end what has become of each container."""
    from criu_rpc.errors import Error
    from migrate.cli.error_report import report
    from migrate.cli.exit_codes import exit_code
    from migrate.cli.flags import Values
    from migrate.source.several import Outcome, move_all
    from runtime.state.store import Store

    outcome = Outcome()

    def failed(container_id: str, error: Error) -> None:
        recorder.failed(container_id, error)
        recorder.close()
        report(error, Values(log=args.log, log_format=args.log_format, json=args.json))

    try:
        move_all(Store(args.root), wanted, recorder, outcome, failed)
    finally:
        recorder.close()
        if outcome.moved or outcome.failed:
            _summarize(args, outcome)
    return exit_code(outcome.kind)


def _summarize(args: argparse.Namespace, outcome: "Outcome") -> None:
    """Say which containers were moved, which were not and why, and which were not tried."""
    from migrate.cli.error_report import printable

    if args.json:
        failed = {name: {"kind": error.kind, "workload": error.workload} for name, error in outcome.failed.items()}
        fields = {"target": args.host, "moved": outcome.moved, "failed": failed, "not_tried": outcome.untried}
        print(json.dumps({"event": "summary", **fields}), flush=True)
        return
    number = f"{len(outcome.moved)} of {len(args.id)} containers moved to {args.host}"
    print(printable(f"{number}: {', '.join(outcome.moved)}" if outcome.moved else number))
    for name, error in outcome.failed.items():
        print(printable(f"{name}: {_KINDS.get(error.kind, 'not moved')} ({error.kind})"))
    if outcome.untried:
        print(printable(f"not tried: {', '.join(outcome.untried)}"))
