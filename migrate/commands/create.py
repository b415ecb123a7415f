"""pymigrate create ID: create a container from a bundle; `start` lets it run."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="name of the new container")
    parser.add_argument("-b", "--bundle", type=Path, default=Path(), metavar="DIR", help="the bundle (default: here)")
    parser.add_argument("--pid-file", type=Path, metavar="FILE", help="write the pid of the container's init to FILE")


def run(args: argparse.Namespace) -> int:
    from runtime import container
    from runtime.state import Store

    container.create(Store(args.root), args.id, args.bundle, pid_file=args.pid_file)
    return 0
