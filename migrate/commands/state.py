"""pymigrate state ID: print the state of a container, as the OCI runtime specification defines it."""

from __future__ import annotations

from migrate.cli.flags import Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax("Print the state of a container as JSON.", (), ("id",))


def run(args: Values) -> int:
    from runtime.light import json as light_json
    from runtime.state import lazy
    from runtime.state.store import Store

    store = Store(args.root)
    found = store.look(args.id)
    state = found.oci(store.status(found)) | lazy.shown(found)
    print(
        "{\n"
        + ",\n".join(f"  {light_json.dumps(name)}: {light_json.dumps(value)}" for name, value in state.items())
        + "\n}"
    )
    return 0
