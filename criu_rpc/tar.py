"""How CRIU's tar packs and unpacks what lies in a container's tmpfs.

CRIU asks for no extended attributes and no ACLs, and has times cut to seconds. tar takes further options from its
environment, which is CRIU's.
"""

import os
from collections.abc import Mapping

_OPTIONS = "--format=posix --xattrs --xattrs-include=* --acls"


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment for CRIU, made of `base` or ours, in which tar keeps all that a file has."""
    return {**(os.environ if base is None else base), "TAR_OPTIONS": _OPTIONS}
