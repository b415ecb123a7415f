"""pymigrate demo [HOST]: move a Redis server to another host and back, and check that nothing is lost."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "host", nargs="?",
        help="another host with pymigrate; both roots must be able to ssh to each other (default: two lab hosts here)",
    )  # fmt: skip
    parser.add_argument(
        "--start", action="store_true",
        help="only start the container `web` on this host, to be moved by hand",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from migrate.demo.hosts import LabHosts, RealHosts
    from migrate.demo.redis import Demo
    from migrate.errors import UsageError

    if args.start and args.host:
        raise UsageError("--start works on this host only: omit HOST")
    if args.start:
        Demo(RealHosts(None)).start()
    else:
        Demo(RealHosts(args.host) if args.host else LabHosts()).run()
    return 0
