"""Hooks: none may take longer than what waits for it can bear."""

import time

import pytest

from runtime.errors import StartFailed
from runtime.init import hooks
from runtime.spec.config import Hook

STATE = {"id": "c", "bundle": "/"}


@pytest.mark.parametrize("timeout", [None, 1000])
def test_all_of_a_point_have_one_deadline(timeout: float | None) -> None:
    many = [Hook("/bin/sh", ("sh", "-c", script), (), timeout) for script in ("exit 0", "exec sleep 1000")]
    with pytest.raises(StartFailed, match=r"hooks\.createRuntime\[1\] \(/bin/sh\): did not exit within 0\.[0-9]* s"):
        hooks.run("createRuntime", many, STATE, deadline=time.monotonic() + 0.5)
