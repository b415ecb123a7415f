"""pymigrate resume ID: resume a paused container."""

from __future__ import annotations

from migrate.cli.flags import Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax("Resume a paused container.", (), ("id",))


def run(args: Values) -> int:
    from runtime.lifecycle import control
    from runtime.state.store import Store

    control.resume(Store(args.root), args.id)
    return 0
