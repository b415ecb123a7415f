"""Snapshots: saved, shown, restored more than once; damage is found before anything is made of it."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.errors import SnapshotError
from migrate.snapshots.manifest import Snapshot
from migrate.snapshots.save import save
from runtime.state.store import Store
from tests.support.boxes import make
from tests.support.hosts import COUNT
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


NOBODY = 65534


def _hook(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    config["hooks"] = {"createRuntime": [{"path": "/bin/touch", "args": ["touch", "/tmp/hooked"]}]}
    (place / "config.json").write_text(json.dumps(config))


def _link(place: Path) -> None:
    (place / "log").unlink()
    (place / "log").symlink_to("/etc/shadow")


def _fields(place: Path, **changes: object) -> None:
    path = place / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _elsewhere(place: Path) -> None:
    (place / "images").rename(place.parent / "images")
    (place / "images").symlink_to(place.parent / "images")


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a hook": (_hook, "config.json: is damaged"),
    "no images": (lambda place: _fields(place, images={}), "manifest.json: "),
    "no images, and none listed by an earlier version": (
        lambda place: (_as_before(place), _fields(place, images={})),
        "does not name all files",
    ),
    "a field": (lambda place: _fields(place, rootfs="/"), "manifest.json: is damaged"),
    "the log is a link": (_link, "log: is a symbolic link"),
    "the log": (lambda place: (place / "log").write_text("other\n"), "log: is damaged"),
    "the digests": (lambda place: _longer(place / "digests"), "digests: is damaged"),
    "the digests of a block": (lambda place: (place / "digests").write_bytes(bytes(32)), "digests: is damaged"),
    "no digests": (lambda place: (place / "digests").unlink(), "digests: No such file"),
    "pages": (lambda place: _longer(place / "images" / "pages-1.img"), "pages-1.img: is damaged"),
    "an unlisted image": (lambda place: (place / "images" / "x.img").touch(), "x.img: is not in the manifest"),
    "an unlisted file": (lambda place: (place / "runtime.json").touch(), "runtime.json: is not in the manifest"),
    "images are elsewhere": (_elsewhere, "images"),
    "a fifo": (
        lambda place: ((place / "config.json").unlink(), os.mkfifo(place / "config.json")), "is not a regular file"
    ),
    "another's directory": (lambda place: os.chown(place, NOBODY, NOBODY), "belongs to user 65534"),
    "another's parent": (lambda place: os.chown(place.parent, NOBODY, NOBODY), "belongs to user 65534"),
    "another's images": (lambda place: os.chown(place / "images", NOBODY, 0), "belongs to user 65534"),
    "another's file": (lambda place: os.chown(place / "config.json", NOBODY, 0), "belongs to user 65534"),
    "a file for all": (lambda place: (place / "images" / "core-1.img").chmod(0o666), "changed by other users"),
    "a directory for a group": (lambda place: place.chmod(0o770), "changed by other users"),
}  # fmt: skip


def test_what_somebody_has_changed_is_refused(pymigrate: Local, snapshot: Path, tmp_path: Path) -> None:
    for number, (name, (change, words)) in enumerate(TAMPERED.items()):
        place = tmp_path / str(number) / "snap"
        shutil.copytree(snapshot, place, symlinks=True)
        with Snapshot.open(place) as found:
            found.verify()
        change(place)
        with pytest.raises(SnapshotError) as refused, Snapshot.open(place) as found:
            found.verify()
        assert words in str(refused.value), (name, refused.value)
    for verb in ("show", "restore"):
        done = pymigrate("snapshot", verb, tmp_path / "0" / "snap", check=False)
        assert (done.returncode, "config.json: is damaged" in done.stderr) == (6, True)


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _as_before(place: Path, version: int = 1) -> None:
    """Make it a snapshot of an earlier version."""
    fields = json.loads((place / "manifest.json").read_text())
    del fields["digest"], fields["eager"]
    (place / "digests").unlink()
    for path in (place / "images").glob("pages-*.img"):
        fields["images"][path.name][1] = hashlib.sha256(path.read_bytes()).hexdigest()
    fields["format"] = version
    if version == 1:
        del fields["files"]
    else:
        fields["digest"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(fields))


def test_a_snapshot_without_digests_of_blocks(pymigrate: Local, snapshot: Path) -> None:
    _as_before(snapshot, 2)
    assert "earlier version" not in pymigrate("snapshot", "show", snapshot).stdout
    pymigrate("snapshot", "restore", snapshot, "--id", "new")
    wait_beyond(pymigrate, "new", 3)
    _longer(snapshot / "images" / "pages-1.img")
    done = pymigrate("snapshot", "restore", snapshot, "--id", "another", check=False)
    assert (done.returncode, "pages-1.img: is damaged" in done.stderr) == (6, True)


def test_a_snapshot_of_an_earlier_version_is_read_and_its_weakness_said(pymigrate: Local, snapshot: Path) -> None:
    _as_before(snapshot)
    assert "covers the images only" in pymigrate("snapshot", "show", snapshot).stdout
    done = pymigrate("snapshot", "restore", snapshot, "--id", "new")
    assert "warning: " in done.stderr
    assert "covers the images only" in done.stderr
    wait_beyond(pymigrate, "new", 3)
    _link(snapshot)
    done = pymigrate("snapshot", "restore", snapshot, "--id", "another", check=False)
    assert (done.returncode, "log: is a symbolic link" in done.stderr) == (6, True)


def test_show_says_what_a_restore_does_here(pymigrate: Local, tmp_path: Path) -> None:
    hook = {"path": "/bin/echo", "args": ["echo", "\x1b[2J", "b"]}
    (tmp_path / "data").mkdir()
    fields = {
        "hooks": {"poststop": [hook]},
        "mounts+": [{"destination": "/tmp", "type": "bind", "source": str(tmp_path / "data"), "options": ["bind"]}],
    }
    pymigrate("run", "-d", "-b", make(tmp_path / "b", COUNT, fields), "c")
    pymigrate("snapshot", "save", "c", tmp_path / "snap", "--allow", "writable-rootfs")
    shown = pymigrate("snapshot", "show", tmp_path / "snap").stdout
    assert "hook:      poststop: /bin/echo \\x1b[2J b (runs here" in shown
    assert f"bind:      {tmp_path}/data at /tmp, writable" in shown
    assert "(as user 0, group 0 of this host)" in shown
    assert "network" not in shown
    fields = json.loads(pymigrate("--json", "snapshot", "show", tmp_path / "snap").stdout)
    assert ["bind", f"{tmp_path}/data at /tmp, writable"] in fields["restore"]


def test_the_disk_has_it_before_it_has_its_name_and_its_name_before_it_is_said(
    pymigrate: Local, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    wait_beyond(pymigrate, "c", 1)
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(fd: int) -> None:
        sync(fd)
        done.append(os.readlink(f"/proc/self/fd/{fd}"))

    def noted_rename(path: Path, new: Path) -> Path:
        done.append("named")
        return rename(path, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(Store(pymigrate.root), "c", tmp_path / "snap", allow=frozenset())
    named = done.index("named")
    for name in ("manifest.json", "config.json", "log", "images/inventory.img", "images"):
        assert any(path.startswith(f"{tmp_path}/.snap.") and path.endswith(f"/{name}") for path in done[:named]), name
    assert done[named + 1 :] == [str(tmp_path)]


def test_it_is_not_saved_where_others_could_change_it(pymigrate: Local, bundle: Path, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    done = pymigrate("snapshot", "save", "c", tmp_path / "open" / "snap", check=False)
    assert (done.returncode, "can be changed by other users" in done.stderr) == (6, True)
    assert list((tmp_path / "open").iterdir()) == []


def test_changed_root_file_system_is_found(pymigrate: Local, snapshot: Path, bundle: Path) -> None:
    (bundle / "rootfs" / "etc" / "new").write_text("x")
    done = pymigrate("snapshot", "restore", snapshot, "--id", "new", check=False)
    assert (done.returncode, "has changed since the snapshot was made" in done.stderr) == (6, True)
    (bundle / "rootfs" / "etc" / "new").unlink()
    copy = bundle.parent / "copy"
    shutil.copytree(bundle / "rootfs", copy, symlinks=True)
    pymigrate("snapshot", "restore", snapshot, "--id", "new", "--rootfs", copy)
    wait_beyond(pymigrate, "new", 3)


def test_no_snapshot(pymigrate: Local, tmp_path: Path) -> None:
    for verb in ("show", "restore"):
        done = pymigrate("snapshot", verb, tmp_path, check=False)
        assert (done.returncode, "is not a snapshot" in done.stderr) == (4, True)


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
