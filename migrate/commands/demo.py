"""pymigrate demo [HOST]: move a Redis to another host and back, and check that nothing is lost."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "host", nargs="?",
        help="another host with pymigrate; the roots can `ssh` to each other (default: two lab hosts on this machine)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from migrate.demo.hosts import LabHosts, RealHosts
    from migrate.demo.redis import CONTAINER, Demo

    Demo(RealHosts(args.host, CONTAINER) if args.host else LabHosts()).run()
    return 0
