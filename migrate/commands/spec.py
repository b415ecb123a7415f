"""pymigrate spec: write a config.json that can be moved."""

from __future__ import annotations

import os

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.cli.flags import Values

SYNTAX = Syntax(
    "Write a config.json to start from. Its container can be moved.",
    (
        Flag(
            "bundle", "directory to write to (default: the current one)", "str", short="b", metavar="DIR", default="."
        ),
        Flag("rootless", "for users other than root: with a user namespace, without limits"),
        Flag("two-file", "write the earlier layout: config.json and runtime.json"),
    ),
)


def run(args: Values) -> int:
    from runtime.spec.default import default_spec, rootless

    value = default_spec()
    if args.rootless:
        value = rootless(value, os.geteuid(), os.getegid())
    files: dict[str, Any] = {"config.json": value}
    if args.two_file:
        from runtime.spec.two_file_split import split

        files["config.json"], files["runtime.json"] = split(value)
    for name in files:
        if os.path.lexists(os.path.join(args.bundle, name)):
            from migrate.errors import UsageError

            path = os.path.join(args.bundle, name)
            raise UsageError(f"{path} already exists", remedy="remove it, or choose another directory")
    import json

    for name, content in files.items():
        with open(os.path.join(args.bundle, name), "x") as file:
            json.dump(content, file, indent=4)
            file.write("\n")
    return 0
