"""What the agent's modules are loaded from."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from migrate.wire import zip_cache
from runtime.linux import trusted

MAIN = """
from top import zip_cache
zip_cache.use()
import plain, package.inner
print(plain.__file__.rpartition("/")[2], package.inner.WORD, package.__path__[0].rpartition("/")[2])
"""
FOUND = "plain.py inner package\n"
DIGEST = "0123456789abcdef" * 4
NOBODY = 65534


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "place" / f"agent-{DIGEST}.pyz"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("__main__.py", MAIN)
        file.writestr("top/__init__.py", "")
        file.writestr("top/zip_cache.py", Path(zip_cache.__file__).read_text())
        file.writestr("runtime/__init__.py", "")
        file.writestr("runtime/linux/__init__.py", "")
        file.writestr("runtime/linux/trusted.py", Path(trusted.__file__).read_text())
        file.writestr("plain.py", "")
        file.writestr("package/__init__.py", "")
        file.writestr("package/inner.py", "WORD = 'inner'")
    return path


def run(path: Path) -> str:
    done = subprocess.run([sys.executable, "-I", "-S", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def kept(archive: Path) -> Path:
    (directory,) = archive.parent.glob(f"agent-{DIGEST}.*/")
    return directory


def test_a_second_start_compiles_nothing(archive: Path, tmp_path: Path) -> None:
    assert run(archive) == FOUND
    directory = kept(archive)
    assert sorted(path.name for path in directory.iterdir()) == ["package", "package.inner", "plain"]
    assert {path.stat().st_mode & 0o777 for path in (directory, *directory.iterdir())} == {0o700, 0o600}
    (directory / "package.inner").write_bytes((directory / "package.inner").read_bytes().replace(b"inner", b"taken"))
    link = tmp_path / "pymigrate.pyz"
    link.symlink_to(archive)
    for path in (archive, link):
        assert run(path) == FOUND.replace("inner", "taken")


@pytest.mark.parametrize("rest", [b"", b"\xe3", b"damaged"])
def test_what_is_damaged_is_made_anew(archive: Path, rest: bytes) -> None:
    run(archive)
    whole = (kept(archive) / "plain").read_bytes()
    (kept(archive) / "plain").write_bytes(rest)
    assert run(archive) == FOUND
    assert (kept(archive) / "plain").read_bytes() == whole


def test_no_room(archive: Path) -> None:
    run(archive)
    directory = kept(archive)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    directory.touch()
    assert run(archive) == FOUND


def spoil(archive: Path, name: str = "package.inner") -> None:
    """Leave other code where an earlier start has kept its own."""
    run(archive)
    path = kept(archive) / name
    path.write_bytes(path.read_bytes().replace(b"inner", b"taken"))


@pytest.mark.parametrize("who", ["directory", "file", "parent", "mode", "file-mode", "parent-mode", "link"])
def test_code_that_another_user_can_write_to_is_not_loaded(archive: Path, who: str) -> None:
    spoil(archive)
    directory = kept(archive)
    file = directory / "package.inner"
    if who == "link":
        file.rename(archive.parent / "elsewhere")
        file.symlink_to(archive.parent / "elsewhere")
    elif who.endswith("mode"):
        {"mode": directory, "file-mode": file, "parent-mode": archive.parent}[who].chmod(0o777)
    else:
        os.chown({"directory": directory, "file": file, "parent": archive.parent}[who], NOBODY, NOBODY)
    assert run(archive) == FOUND


def test_nothing_is_kept_beside_a_zip_file_that_can_be_replaced(archive: Path) -> None:
    copy = archive.with_name("pymigrate.pyz")
    shutil.copy(archive, copy)
    assert run(copy) == FOUND
    assert [path.name for path in archive.parent.iterdir() if path.is_dir()] == []
    archive.parent.chmod(0o777)
    assert run(archive) == FOUND
    assert [path.name for path in archive.parent.iterdir() if path.is_dir()] == []


def test_a_directory_that_is_everybodys_but_sticky_can_be_a_parent(archive: Path) -> None:
    spoil(archive)
    archive.parent.parent.chmod(0o1777)
    assert run(archive) == FOUND.replace("inner", "taken")
