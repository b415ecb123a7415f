"""Hooks of a bundle: programs that get the container's state on stdin (runtime-spec, config.md)."""

from __future__ import annotations

import os

from runtime import jsonio, notices
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
        _run(f"hooks.{point}[{index}] ({hook.path})", hook, state, cwd)


def run_all(point: str, hooks: Iterable[Hook], state: dict[str, Any]) -> None:
    """Run the hooks of a point that comes too late to undo anything: for one that fails there is a warning.

    So says version 1.2 of the specification of poststart and poststop (runtime.md, lifecycle).
    """
    for index, hook in enumerate(hooks):
        try:
            _run(f"hooks.{point}[{index}] ({hook.path})", hook, state, None)
        except StartFailed as error:
            notices.warn(str(error))


def _run(where: str, hook: Hook, state: dict[str, Any], cwd: str | None) -> None:
    subprocess = preload()
    environment = dict(entry.partition("=")[::2] for entry in hook.env)
    try:
        done = subprocess.run(
            list(hook.args), executable=hook.path, env=environment, input=jsonio.dumps(state).encode(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=hook.timeout,
            cwd=cwd or (state["bundle"] if os.path.isdir(state["bundle"]) else "/"),  # it may be gone by now
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StartFailed(f"{where}: did not end within {hook.timeout:g} s") from None
    except (OSError, ValueError, TypeError) as error:  # TypeError: of a state.json that is not as we wrote it
        raise StartFailed(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise StartFailed(": ".join([f"{where}: exit status {done.returncode}", *words]))
