"""pymigrate pause ID: freeze all processes of a container."""

from __future__ import annotations

from migrate.cli.flags import Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax("Freeze all processes of a container. `resume` thaws them.", (), ("id",))


def run(args: Values) -> int:
    from runtime.lifecycle import control
    from runtime.state.store import Store

    control.pause(Store(args.root), args.id)
    return 0
