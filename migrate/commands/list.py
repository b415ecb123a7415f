"""pymigrate list: list the containers of this host."""

from __future__ import annotations

import sys

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values
    from runtime.state.record import State
    from runtime.state.store import Store

FORMAT = Flag("format", "output format", "str", short="f", default="table", choices=("table", "json"))
SYNTAX = Syntax("List the containers of this host.", (FORMAT, Flag("quiet", "print only the ids", short="q")))


def run(args: Values) -> int:
    from migrate.ui.text import table
    from runtime.errors import ContainerError
    from runtime.light import json as light_json
    from runtime.state import lazy
    from runtime.state.store import Store

    store = Store(args.root)
    states = []
    for container_id in store.ids():
        try:
            state = _load(store, container_id)
            if state is not None:
                states.append(state.oci(store.status(state)) | lazy.shown(state))
        except ContainerError as error:  # a broken container must not hide the others
            print(f"pymigrate: warning: {error}", file=sys.stderr)
    if args.quiet:
        print(*(state["id"] for state in states), sep="\n", end="\n" if states else "")
    elif args.format == "json" or args.json:
        print(light_json.dumps(states))
    else:
        for shown in states:
            if "memory" in shown:
                shown["status"] += f" ({lazy.words(shown['memory'])})"
        names = ("id", "pid", "status", "bundle", "created", "owner")
        rows = [tuple(str(shown[name]) for name in names) for shown in states]
        print(*table(tuple(name.upper() for name in names), rows), sep="\n")
    return 0


def _load(store: Store, container_id: str) -> State | None:
    """Return the state of a container, or None if another process is just making or removing it."""
    import os

    from runtime.errors import NotFound

    try:
        return store.look(container_id)
    except NotFound:
        if store.is_busy(container_id) or not os.path.isdir(store.directory(container_id)):
            return None
    return store.look(container_id)  # it was made in between, or a killed process left it behind
