"""pymigrate attach ID: connect to the terminal or the output of a detached container."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Connect to the terminal of a detached container (run -d with process.terminal). Several users can be connected\n"
    "at once. For a container without a terminal, show its output. `attach` returns the container's exit status. The\n"
    "detach keys leave the container running (exit status 0). If the container is moved, `attach` names the new host\n"
    "and returns 15.",
    (
        Flag("detach-keys", "keys that detach: letters and ctrl-X, separated by commas (default ctrl-p,ctrl-q);"
             " \"\" for none", "str", metavar="KEYS", default="ctrl-p,ctrl-q"),
        Flag("no-stdin", "only show output; do not send keys"),
    ),
    ("id",),
)  # fmt: skip


def parse_keys(text: str) -> bytes:
    """Return the bytes of a text such as "ctrl-p,x". Raises UsageError."""
    from migrate.errors import UsageError

    keys = bytearray()
    for name in text.split(",") if text else ():
        key = name.removeprefix("ctrl-")
        if len(key) != 1 or not key.isascii() or not key.isprintable():
            raise UsageError(f"--detach-keys {text}: invalid key {name!r}", remedy="name keys as in ctrl-p,ctrl-q or x")
        if key == name:
            keys += key.encode()
        elif "@" <= key.upper() <= "_":
            keys.append(ord(key.upper()) & 0x1F)
        else:
            raise UsageError(
                f"--detach-keys {text}: invalid key {name!r}", remedy="after ctrl- use a letter or one of @[\\]^_"
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
