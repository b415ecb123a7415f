"""Replacing a file: the old contents or the new, and nothing beside it."""

import os
import resource
import stat
from pathlib import Path

import pytest

from runtime.linux import files


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    path.chmod(0o644)
    files.replace(str(path), b"new", durable=durable)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A file size limit takes what fits and refuses the rest, as a full disk does (Python ignores SIGXFSZ)."""
    path = tmp_path / "state.json"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            files.replace(str(path), b"new state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]
