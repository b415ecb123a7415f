"""pymigrate start ID: start a created container."""

from __future__ import annotations

from migrate.cli.flags import Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax("Start the program of a created container.", (), ("id",))


def run(args: Values) -> int:
    from runtime.lifecycle.start import start
    from runtime.state.store import Store

    start(Store(args.root), args.id)
    return 0
