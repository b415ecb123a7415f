"""The directories of this host that moves use."""

from pathlib import Path

DATA = Path("/var/lib/pymigrate")
