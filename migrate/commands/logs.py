"""pymigrate logs ID: print what a container wrote to stdout and stderr, on this host and those it came from."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="print new output until the container exits")
    parser.add_argument("-n", "--tail", type=int, metavar="N", help="only the last N lines")
    parser.add_argument("-t", "--timestamps", action="store_true", help="print the time before each line")
    parser.add_argument("id", help="the container")


def run(args: argparse.Namespace) -> int:
    from runtime.monitor import logs
    from runtime.state.store import Store

    log = logs.Log(Store(args.root).look(args.id))
    entries = log.read()
    for entry in entries[-args.tail :] if args.tail else [] if args.tail == 0 else entries:
        _print(entry, timestamps=args.timestamps)
    if args.follow:
        for entry in log.follow():
            _print(entry, timestamps=args.timestamps)
    return 0


def _print(entry: bytes, *, timestamps: bool) -> None:
    time, stream, tag, text = (*entry.split(b" ", 3), b"", b"", b"")[:4]
    out = sys.stderr if stream == b"stderr" else sys.stdout
    line = (time + b" " if timestamps else b"") + text
    out.buffer.write(line + (b"" if tag == b"P" else b"\n"))
    out.flush()
