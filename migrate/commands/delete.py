"""pymigrate delete ID: remove a stopped container, or any with --force."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Remove a container that has stopped.",
    (Flag("force", "kill it first if it runs; it may also not exist", short="f"),),
    ("id",),
)


def run(args: Values) -> int:
    from runtime.lifecycle import delete
    from runtime.state.store import Store

    delete.delete(Store(args.root), args.id, force=args.force)
    return 0
