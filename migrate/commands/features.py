"""pymigrate features: print the features of this runtime, as the OCI runtime specification defines them."""

from __future__ import annotations

from migrate.cli.flags import Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values

SYNTAX = Syntax("Print the features of this runtime, as JSON.")


def run(args: Values) -> int:
    import json

    from migrate import __version__
    from runtime.lifecycle.features import features

    value = features()
    value["annotations"]["org.pymigrate.version"] = __version__
    print(json.dumps(value, indent=None if args.json else 2))
    return 0
