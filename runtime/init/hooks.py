"""Run the hooks of a bundle: programs that get the container's state on stdin (runtime-spec, config.md)."""

from __future__ import annotations

import os
import time

from runtime import notices
from runtime.errors import StartFailed
from runtime.light import json as light_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType
    from typing import Any

    from runtime.spec.config import Hook
    from runtime.state.record import State


def preload() -> ModuleType:
    """Import what running a hook needs, for a process that cannot import later."""
    import subprocess

    return subprocess


def run(
    point: str, hooks: Iterable[Hook], state: dict[str, Any], *, cwd: str | None = None, deadline: float | None = None
) -> None:
    """Run the hooks of one point in order, in the directory `cwd`, by default the bundle.

    Raises StartFailed at the first hook that fails or exceeds its timeout, or the `deadline` (monotonic) of all.
    """
    for index, hook in enumerate(hooks):
        if deadline is not None:
            left = max(deadline - time.monotonic(), 0.001)
            hook = hook.replace(timeout=min(hook.timeout or left, left))
        _run(f"hooks.{point}[{index}] ({hook.path})", hook, state, cwd)


def run_all(point: str, hooks: Iterable[Hook], state: dict[str, Any]) -> None:
    """Run the hooks of a point that comes too late to undo anything; warn of each that fails.

    Version 1.2 of the specification requires this of poststart and poststop (runtime.md, lifecycle).
    """
    for index, hook in enumerate(hooks):
        try:
            _run(f"hooks.{point}[{index}] ({hook.path})", hook, state, None)
        except StartFailed as error:
            notices.warn(str(error))


def run_later(state: State, point: str, status: str | None = None) -> None:
    """Run the hooks kept in state.json, as `run_all` does; they see `status`, by default the container's status."""
    from runtime.spec.config import Hook

    try:
        known = [Hook(**hook) for hook in state.hooks[point]]
    except TypeError:  # state.json was changed by another program
        notices.warn(f"hooks.{point}: not run, because state.json of container {state.id} has a malformed hook")
        return
    run_all(point, known, state.oci(status))


def _run(where: str, hook: Hook, state: dict[str, Any], cwd: str | None) -> None:
    """Run one hook. Its stderr is a file and not a pipe, so that a process it leaves behind is not waited for."""
    subprocess = preload()
    stderr = os.memfd_create("stderr")
    try:
        environment = dict(entry.partition("=")[::2] for entry in hook.env)
        process = subprocess.Popen(
            list(hook.args), executable=hook.path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=stderr, cwd=cwd or (state["bundle"] if os.path.isdir(state["bundle"]) else "/"),  # or it is gone
        )  # fmt: skip
        try:
            process.communicate(light_json.dumps(state).encode(), hook.timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        words = os.pread(stderr, 1 << 16, 0).decode(errors="replace").strip().splitlines()[-1:]
    except subprocess.TimeoutExpired:
        raise StartFailed(f"{where}: did not exit within {hook.timeout:.3g} s") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: a malformed state.json
        raise StartFailed(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        os.close(stderr)
    if process.returncode != 0:
        raise StartFailed(": ".join([f"{where}: exit status {process.returncode}", *words]))
