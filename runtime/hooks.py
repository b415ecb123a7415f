"""Hooks of a bundle: programs that get the container's state on stdin (runtime-spec, config.md)."""

from __future__ import annotations

import os
import sys

from runtime import jsonio
from runtime.errors import StartFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType
    from typing import Any

    from runtime.spec import Hook


def preload() -> ModuleType:
    """What running a hook needs; for a process that cannot import later."""
    import subprocess

    return subprocess


def run(point: str, hooks: Iterable[Hook], state: dict[str, Any], *, cwd: str | None = None) -> None:
    """Run the hooks of one point in order, in the directory `cwd`, else in the bundle.

    Raises StartFailed at the first that fails or exceeds its timeout.
    """
    for index, hook in enumerate(hooks):
        _run(f"hooks.{point}[{index}] ({hook.path})", hook, state, cwd or state["bundle"])


def run_all(point: str, hooks: Iterable[Hook], state: dict[str, Any]) -> None:
    """Run the hooks of a point that must not stop anything: one that fails is a warning on stderr (runtime.md)."""
    cwd = state["bundle"] if os.path.isdir(state["bundle"]) else "/"  # it may be gone meanwhile
    for index, hook in enumerate(hooks):
        try:
            _run(f"hooks.{point}[{index}] ({hook.path})", hook, state, cwd)
        except StartFailed as error:
            print(f"pymigrate: warning: {error}", file=sys.stderr)


def _run(where: str, hook: Hook, state: dict[str, Any], cwd: str) -> None:
    subprocess = preload()
    environment = dict(entry.partition("=")[::2] for entry in hook.env)
    try:
        done = subprocess.run(
            list(hook.args), executable=hook.path, env=environment, input=jsonio.dumps(state).encode(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=hook.timeout, cwd=cwd,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StartFailed(f"{where}: did not end within {hook.timeout:g} s") from None
    except (OSError, ValueError) as error:
        raise StartFailed(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise StartFailed(": ".join([f"{where}: exit status {done.returncode}", *words]))
