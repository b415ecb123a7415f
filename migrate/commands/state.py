"""pymigrate state ID: the state of a container, as the OCI runtime specification defines it."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the container")


def run(args: argparse.Namespace) -> int:
    from runtime.state import Store

    print(json.dumps(Store(args.root).load(args.id).oci(), indent=2))
    return 0
