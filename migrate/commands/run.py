"""pymigrate run ID: create and start a container; in the foreground unless --detach."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax
from migrate.commands import create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

FLAGS = (
    *create.FLAGS,
    Flag("detach", "return once it runs; `logs` shows its output", short="d"),
    Flag("keep", "do not delete the container when it exits"),
    Flag("no-subreaper", "accepted for compatibility with runc and ignored"),
)
SYNTAX = Syntax(
    "Create and start a container, with the caller's stdin, stdout and stderr unless --detach.", FLAGS, ("id",)
)


def run(args: Values) -> int:
    from runtime.lifecycle import delete
    from runtime.lifecycle import run as foreground
    from runtime.lifecycle.create import create as make
    from runtime.lifecycle.start import start
    from runtime.state.store import Store

    store, options = Store(args.root), create.options(args)
    if not args.detach:
        return foreground.run(store, args.id, args.bundle, options, keep=args.keep)
    state = make(store, args.id, args.bundle, options.replace(monitored=True))
    try:
        start(store, args.id)
    except BaseException:
        delete.delete(store, args.id, force=True, created=state.created)
        raise
    return 0
