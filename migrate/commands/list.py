"""pymigrate list: the containers of this host."""

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--format", choices=("table", "json"), default="table")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the ids")


def run(args: argparse.Namespace) -> int:
    from migrate.ui.text import table
    from runtime.errors import ContainerError
    from runtime.state import Store

    store = Store(args.root)
    states = []
    for container_id in store.ids():
        try:
            states.append(store.load(container_id).oci())
        except ContainerError as error:  # one that is broken must not hide the others
            print(f"pymigrate: warning: {error}", file=sys.stderr)
    if args.quiet:
        print(*(state["id"] for state in states), sep="\n", end="\n" if states else "")
    elif args.format == "json" or args.json:
        print(json.dumps(states))
    else:
        names = ("id", "pid", "status", "bundle", "created", "owner")
        for line in table(
            tuple(map(str.upper, names)), [tuple(str(state[name]) for name in names) for state in states]
        ):
            print(line)
    return 0
