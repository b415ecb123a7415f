"""pymigrate move ID HOST: move a running container to another host."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")
    parser.add_argument("host", help="[USER@]HOST, as ssh knows it")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="RULE", help="lift a rule of `pymigrate validate` (repeatable)"
    )
    parser.add_argument(
        "--volume", action="append", default=[], metavar="PATH=copy|shared|NEWPATH",
        help="what is bound on PATH: send it along, or use the target's at the same path or another (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS",
        help="give up and go on at the source when the container has been frozen this long (default 120)",
    )  # fmt: skip
    parser.add_argument(
        "--net", metavar="bridge=NAME", help="the bridge at the target, where it is called otherwise there"
    )
    parser.add_argument(
        "--tcp-close", action="store_true",
        help="the container finds its TCP connections closed: for a target in another network; its peers are not told",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from migrate.coordinator import Coordinator
    from migrate.model import MigrationSpec
    from migrate.ui import monitor
    from migrate.volumes import parse
    from runtime.state import Store

    wanted = MigrationSpec(
        args.id, args.host, frozenset(args.allow), timeout=args.timeout, net=args.net, tcp_close=args.tcp_close,
        volumes=parse(args.volume),
    )  # fmt: skip
    display = monitor(as_json=args.json)
    try:
        Coordinator(Store(args.root), wanted, display).run()
    finally:
        display.close()
    return 0
