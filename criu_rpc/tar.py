"""Options for the tar that CRIU runs to pack and unpack a container's tmpfs.

CRIU does not ask for extended attributes or ACLs, and truncates times to seconds. tar takes further options from its
environment, which it inherits from CRIU.
"""

import os
from collections.abc import Mapping

_OPTIONS = "--format=posix --xattrs --xattrs-include=* --acls"


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment for CRIU, made of `base` (default: this process's), in which tar keeps all attributes."""
    return {**(os.environ if base is None else base), "TAR_OPTIONS": _OPTIONS}
