"""pymigrate delete ID: delete a stopped container, or with --force any container."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Delete a stopped container.",
    (Flag("force", "kill a running container first; a missing container is not an error", short="f"),),
    ("id",),
)


def run(args: Values) -> int:
    from runtime.lifecycle import delete
    from runtime.state.store import Store

    delete.delete(Store(args.root), args.id, force=args.force)
    return 0
