"""Start pymigrate's own code again in a fresh interpreter, for what must run beside this process or outlive it."""

import os
import sys
from pathlib import Path


def argv(*args: str) -> list[str]:
    """Return an argv for `pymigrate ARGS` with this code and these libraries, however this process was started."""
    return _fresh("from migrate.cli import entry; entry()", args)


def module(name: str, *args: str) -> list[str]:
    """Return an argv that runs `main(args)` of the module `name` in the same way."""
    return _fresh(f"from {name} import main; sys.exit(main(sys.argv[1:]))", args)


def _fresh(code: str, args: tuple[str, ...]) -> list[str]:
    origin = str(Path(__file__).resolve().parent.parent)
    places = [origin, *(place for place in sys.path if place and place != origin)]
    start = f"import sys; sys.argv[0] = {_program()!r}; sys.path[:] = {places!r}; {code}"
    return [sys.executable, "-I", "-S", "-c", start, *args]


def directory() -> str:
    """Return the directory of the `pymigrate` command, for a PATH."""
    return os.path.dirname(_program())


def _program() -> str:
    """Return the launcher that started this process, otherwise the one beside the interpreter."""
    started_as = os.path.abspath(sys.argv[0])
    if os.path.basename(started_as) == "pymigrate":
        return started_as
    return os.path.join(os.path.dirname(sys.executable), "pymigrate")
