"""The freezer of cgroups. `paths` maps a version 1 controller, or "" for version 2, to a directory of the container."""

from __future__ import annotations

import time

from runtime.cgroups.hierarchies import UNIFIED
from runtime.errors import ContainerError, DeadlineExceeded
from runtime.limits import FREEZER_TIMEOUT
from runtime.linux.files import read, wait_until, write


def is_frozen(paths: dict[str, str]) -> bool:
    """Whether the freezer has frozen the processes."""
    try:
        if "freezer" in paths:
            return read(f"{paths['freezer']}/freezer.state") != "THAWED"
        if UNIFIED in paths:
            return read(f"{paths[UNIFIED]}/cgroup.freeze") == "1"
    except OSError:
        return False
    return False


def freeze(paths: dict[str, str]) -> None:
    """Freeze all processes and wait for it; thaws them on failure. Raises ContainerError, DeadlineExceeded."""
    hold(paths)
    if not _await_frozen(paths):
        thaw(paths)
        raise DeadlineExceeded(
            f"the processes of {next(iter(paths.values()))} did not freeze within {FREEZER_TIMEOUT:g} s"
        )


def hold(paths: dict[str, str]) -> None:
    """Freeze all processes without waiting: traced ones freeze when they are released. Raises ContainerError."""
    _write(paths, "FROZEN", "1")


def thaw(paths: dict[str, str]) -> None:
    """Thaw the processes; harmless if none is frozen. Raises ContainerError."""
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
            raise ContainerError("this host does not have a freezer cgroup")
    except OSError as error:
        raise ContainerError(f"{error.filename or next(iter(paths.values()))}: {error.strerror}") from None


def _await_frozen(paths: dict[str, str]) -> bool:
    if "freezer" not in paths:
        return wait_until(f"{paths[UNIFIED]}/cgroup.events", lambda events: events.get("frozen") == 1, FREEZER_TIMEOUT)
    deadline = time.monotonic() + FREEZER_TIMEOUT
    # The version 1 freezer sends no notification. It checks its processes when its state is read.
    while read(f"{paths['freezer']}/freezer.state") != "FROZEN":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
        _write(paths, "FROZEN", "1")
    return True
