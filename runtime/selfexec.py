"""Running a module of this very code in a fresh interpreter, from a directory or from the agent's zip file."""

import sys
from pathlib import Path


def _origin() -> str:
    """The directory or zip file on sys.path that this package was loaded from."""
    return str(Path(__file__).parent.parent)


def command(module: str, *args: str) -> list[str]:
    """An argv that runs `module.main(args)` isolated from the environment and without site-packages."""
    start = f"import sys; sys.path.insert(0, {_origin()!r}); from {module} import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-I", "-S", "-c", start, *args]
