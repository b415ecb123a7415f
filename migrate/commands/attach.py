"""pymigrate attach ID: use the terminal of a container that runs detached, or see what it writes."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Use the terminal of a container that runs detached (run -d with process.terminal), several at once if need be.\n"
    "Of a container without one, see what it writes. Ends with the container's exit status; the detach keys leave it\n"
    "running (exit status 0). When the container is moved it ends with a line that says where to, and status 15.",
    (
        Flag("detach-keys", "keys that end this: letters and ctrl-X, with commas between (default ctrl-p,ctrl-q);"
             " \"\" for none", "str", metavar="KEYS", default="ctrl-p,ctrl-q"),
        Flag("no-stdin", "only watch; keys go nowhere"),
    ),
    ("id",),
)  # fmt: skip


def parse_keys(text: str) -> bytes:
    """The bytes of "ctrl-p,x". Raises UsageError."""
    from migrate.errors import UsageError

    keys = bytearray()
    for name in text.split(",") if text else ():
        key = name.removeprefix("ctrl-")
        if len(key) != 1 or not key.isascii() or not key.isprintable():
            raise UsageError(f"--detach-keys {text}: {name!r} is no key", remedy="such as ctrl-p,ctrl-q or x")
        if key == name:
            keys += key.encode()
        elif "@" <= key.upper() <= "_":
            keys.append(ord(key.upper()) & 0x1F)
        else:
            raise UsageError(
                f"--detach-keys {text}: {name!r} is no key", remedy="ctrl- and a letter, or one of @[\\]^_"
            )
    return bytes(keys)


def run(args: Values) -> int:
    from migrate.cli.exit_codes import exit_code
    from runtime import notices
    from runtime.monitor import attach
    from runtime.state.store import Store

    ended = attach.attach(Store(args.root), args.id, parse_keys(args.detach_keys), stdin=not args.no_stdin)
    if ended.kind == "moved":
        notices.say(f"[moved to {ended.host}: pymigrate attach {args.id} there]")
        return exit_code("moved")
    if ended.kind == "detached":
        notices.say(f"[detached from {args.id}]")
    return ended.status
