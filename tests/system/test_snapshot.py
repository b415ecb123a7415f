"""Snapshots: saved, shown, restored more than once; damage is found before anything is made of it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system.conftest import Local


def numbers(pymigrate: Local, container: str) -> list[int]:
    return [int(line) for line in pymigrate("logs", container).stdout.split()]


def wait_beyond(pymigrate: Local, container: str, number: int) -> int:
    for _ in range(200):
        found = numbers(pymigrate, container)
        if found and found[-1] > number:
            return found[-1]
    raise AssertionError(f"{container} does not count beyond {number}")


@pytest.fixture
def snapshot(pymigrate: Local, bundle: Path, tmp_path: Path) -> Path:
    pymigrate("run", "-d", "-b", bundle, "c")
    wait_beyond(pymigrate, "c", 2)
    pymigrate("snapshot", "save", "c", tmp_path / "snap")
    return tmp_path / "snap"


def test_the_container_goes_on_and_the_snapshot_can_be_restored_twice(pymigrate: Local, snapshot: Path) -> None:
    wait_beyond(pymigrate, "c", numbers(pymigrate, "c")[-1])
    shown = pymigrate("snapshot", "show", snapshot).stdout
    assert "all intact" in shown
    assert json.loads(pymigrate("snapshot", "show", snapshot, "--json").stdout)["id"] == "c"
    assert json.loads(pymigrate("snapshot", "--json", "show", snapshot).stdout)["id"] == "c"
    for name in ("one", "two"):
        pymigrate("snapshot", "restore", snapshot, "--id", name)
        wait_beyond(pymigrate, name, 3)
        found = numbers(pymigrate, name)
        assert found == list(range(1, found[-1] + 1)), "the clone does not go on where the snapshot was made"
    assert pymigrate("list", "-q").stdout.split() == ["c", "one", "two"]


def test_files_are_private(snapshot: Path) -> None:
    assert snapshot.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in (snapshot / "images").iterdir()} == {0}


def test_stop_ends_the_container(pymigrate: Local, bundle: Path, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    before = wait_beyond(pymigrate, "c", 2)
    pymigrate("snapshot", "save", "--stop", "c", tmp_path / "snap")
    assert json.loads(pymigrate("state", "c").stdout)["status"] == "stopped"
    pymigrate("delete", "c")
    pymigrate("snapshot", "restore", tmp_path / "snap")
    wait_beyond(pymigrate, "c", before)


def test_id_in_use(pymigrate: Local, snapshot: Path) -> None:
    done = pymigrate("snapshot", "restore", snapshot, check=False)
    assert (done.returncode, "already exists" in done.stderr) == (5, True)


def test_directory_in_use_is_not_touched(pymigrate: Local, snapshot: Path) -> None:
    before = (snapshot / "manifest.json").read_bytes()
    done = pymigrate("snapshot", "save", "c", snapshot, check=False)
    assert "exists already" in done.stderr
    assert (snapshot / "manifest.json").read_bytes() == before
    assert [path.name for path in snapshot.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest", "field", "traversal"])
def test_damage_is_found(pymigrate: Local, snapshot: Path, damage: str) -> None:
    image = snapshot / "images" / "core-1.img"
    manifest = snapshot / "manifest.json"
    fields = json.loads(manifest.read_text())
    if damage == "flip":
        data = bytearray(image.read_bytes())
        data[len(data) // 2] ^= 1
        image.write_bytes(data)
    elif damage == "missing":
        image.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "field":
        manifest.write_text(json.dumps(fields | {"rootfs": 5}))
    else:
        fields["images"]["../../x"] = [1, "0"]
        manifest.write_text(json.dumps(fields))
    done = pymigrate("snapshot", "restore", snapshot, "--id", "new", check=False)
    assert done.returncode == 6, done.stderr
    assert "core-1.img" in done.stderr or "manifest.json" in done.stderr
    assert not (pymigrate.root / "new").exists()


def test_changed_root_file_system_is_found(pymigrate: Local, snapshot: Path, bundle: Path) -> None:
    (bundle / "rootfs" / "etc" / "new").write_text("x")
    done = pymigrate("snapshot", "restore", snapshot, "--id", "new", check=False)
    assert (done.returncode, "is not what it was" in done.stderr) == (6, True)
    (bundle / "rootfs" / "etc" / "new").unlink()
    copy = bundle.parent / "copy"
    shutil.copytree(bundle / "rootfs", copy, symlinks=True)
    pymigrate("snapshot", "restore", snapshot, "--id", "new", "--rootfs", copy)
    wait_beyond(pymigrate, "new", 3)


def test_no_snapshot(pymigrate: Local, tmp_path: Path) -> None:
    for verb in ("show", "restore"):
        done = pymigrate("snapshot", verb, tmp_path, check=False)
        assert (done.returncode, "is no snapshot" in done.stderr) == (4, True)


def test_full_disk_leaves_the_container_running(pymigrate: Local, bundle: Path, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    before = wait_beyond(pymigrate, "c", 2)
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")], check=True)
    try:
        for options in ([], ["--stop"]):
            done = pymigrate("snapshot", "save", *options, "c", tmp_path / "small" / "snap", check=False)
            assert (done.returncode, "no room at" in done.stderr) == (13, True), done.stderr
            assert list((tmp_path / "small").iterdir()) == []
            before = wait_beyond(pymigrate, "c", before)
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)
