"""The freezer of cgroups. `paths` maps a version 1 controller, or "" for version 2, to a directory of a container's."""

from __future__ import annotations

import time

from runtime.cgroups.hierarchies import UNIFIED
from runtime.errors import ContainerError, DeadlineExceeded
from runtime.limits import FREEZER_TIMEOUT
from runtime.linux.files import read, wait_until, write


def is_frozen(paths: dict[str, str]) -> bool:
    """Whether its processes are paused by the freezer."""
    try:
        if "freezer" in paths:
            return read(f"{paths['freezer']}/freezer.state") != "THAWED"
        if UNIFIED in paths:
            return read(f"{paths[UNIFIED]}/cgroup.freeze") == "1"
    except OSError:
        return False
    return False


def freeze(paths: dict[str, str]) -> None:
    """Pause all processes, and wait until they are. Raises ContainerError, DeadlineExceeded: they run on then."""
    hold(paths)
    if not _await_frozen(paths):
        thaw(paths)
        raise DeadlineExceeded(f"the processes of {next(iter(paths.values()))} cannot be frozen")


def hold(paths: dict[str, str]) -> None:
    """Pause all processes, those that are traced as soon as they are let go of. Raises ContainerError."""
    _write(paths, "FROZEN", "1")


def thaw(paths: dict[str, str]) -> None:
    """Let the processes go on; harmless when nothing is frozen, or not any more. Raises ContainerError."""
    try:
        _write(paths, "THAWED", "0")
    except ContainerError:
        if is_frozen(paths):
            raise


def _write(paths: dict[str, str], v1_state: str, v2_state: str) -> None:
    try:
        if "freezer" in paths:
            write(f"{paths['freezer']}/freezer.state", v1_state)
        elif UNIFIED in paths:
            write(f"{paths[UNIFIED]}/cgroup.freeze", v2_state)
        else:
            raise ContainerError("this host has no freezer cgroup")
    except OSError as error:
        raise ContainerError(f"{error.filename or next(iter(paths.values()))}: {error.strerror}") from None


def _await_frozen(paths: dict[str, str]) -> bool:
    if "freezer" not in paths:
        return wait_until(f"{paths[UNIFIED]}/cgroup.events", lambda events: events.get("frozen") == 1, FREEZER_TIMEOUT)
    deadline = time.monotonic() + FREEZER_TIMEOUT
    # The version 1 freezer tells nobody, and looks at its processes when it is read.
    while read(f"{paths['freezer']}/freezer.state") != "FROZEN":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
        _write(paths, "FROZEN", "1")
    return True
