"""Images on their way to the disk: what is synced in which order, what is verified, what a failure leaves."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.errors import MigrateError, TargetError
from migrate.journal import journal
from migrate.journal.journal import Journal
from migrate.phases import Phase
from migrate.target import image_manifest, image_places
from migrate.target import images as images_module
from migrate.target.image_manifest import Manifest
from migrate.target.images import ReceivedImages

MIGRATION = "20261130T120000-0123456789abcdef"
DATA = {"inventory.img": b"inventory", "pages-1.img": b"x" * 100_000, "core-1.img": b""}


@pytest.fixture
def received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReceivedImages:
    """Images as they are when all have come: of the pages nobody knows a digest yet."""
    for name, path in (("PLACE", "run"), ("MEMORY", "run/memory"), ("DISK", "incoming")):
        monkeypatch.setattr(image_places, name, tmp_path / path)
    monkeypatch.setattr(image_places, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "migrations")
    monkeypatch.setattr(journal.sync, "__kwdefaults__", {"directory": tmp_path / "migrations"})
    monkeypatch.setattr(journal.load, "__kwdefaults__", {"directory": tmp_path / "none"})  # no files belong to the move
    log = Journal.begin(MIGRATION, directory=tmp_path / "migrations", role="target", id="web", source="a", target="b")
    log.record(Phase.SEED)
    path = image_places.MEMORY / MIGRATION
    path.mkdir(parents=True)
    for name, data in DATA.items():
        (path / name).write_bytes(data)
    (path / "restore.log").write_bytes(b"not an image")
    images = ReceivedImages(MIGRATION, path, "memory")
    digests = {name: image_manifest.digest_of(path / name)[1] for name in DATA if not name.startswith("pages")}
    Manifest.of(MIGRATION, path, digests).save(path, durable=False)
    return images


def test_everything_is_synced_before_it_has_its_name(
    received: ReceivedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fsync(fd: int, original: object = os.fsync) -> None:
        done.append("sync " + os.readlink(f"/proc/self/fd/{fd}").removeprefix(f"{tmp_path}/"))

    def rename(source: str | Path, target: str | Path, original: Callable[..., None] = os.rename) -> None:
        done.append(f"rename {Path(target).relative_to(tmp_path)}")
        original(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    received.persist()
    new, path = f"incoming/{MIGRATION}.new", f"incoming/{MIGRATION}"
    assert sorted(done[:3]) == sorted(f"sync {new}/{name}" for name in DATA)
    assert done[3:] == [
        f"sync {new}/.manifest.json.{os.getpid()}",
        f"rename {new}/manifest.json",
        f"sync {new}",
        f"rename {path}",
        "sync incoming",
        f"sync migrations/{MIGRATION}.jsonl",
        "sync migrations",
    ]
    assert (received.kind, received.path) == ("disk", tmp_path / path)
    assert {entry.name for entry in received.path.iterdir()} == {*DATA, "manifest.json"}
    assert {entry.stat().st_mode & 0o777 for entry in received.path.iterdir()} == {0o600}
    assert not image_places.MEMORY.exists()
    received.verify()


@pytest.mark.parametrize("persisted", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        pytest.param("inventory.img", b"inventorx", "inventory.img: is damaged", id="damaged"),
        pytest.param("inventory.img", b"inventory.", "inventory.img: is damaged", id="longer"),
        pytest.param("pages-1.img", b"x" * 99_999, "pages-1.img: is damaged", id="cut"),
        pytest.param("pages-1.img", None, "pages-1.img: is missing", id="missing"),
        pytest.param("fs-1.img", b"", "fs-1.img: is not listed", id="unlisted"),
    ],
)
def test_what_is_wrong_is_named(
    received: ReceivedImages, name: str, data: bytes | None, words: str, persisted: bool
) -> None:
    if persisted:
        received.persist()
    received.verify()
    if data is None:
        (received.path / name).unlink()
    else:
        (received.path / name).write_bytes(data)
    with pytest.raises(TargetError, match=words):
        received.verify()


def test_pages_are_verified_on_the_disk(received: ReceivedImages) -> None:
    received.persist()
    (received.path / "pages-1.img").write_bytes(b"y" * 100_000)
    with pytest.raises(TargetError, match=r"pages-1\.img: is damaged \(100000 bytes, SHA-256 "):
        received.verify()


def test_images_that_were_never_synced_do_not_count_after_a_restart(
    received: ReceivedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the disk of a host without memory to spare: the power may have gone before they were written."""
    monkeypatch.setattr(image_manifest, "boot_id", lambda: "another")
    with pytest.raises(TargetError, match=r"pages-1\.img: this host was restarted before the image was on its disk"):
        received.verify()


def test_a_damaged_image_does_not_get_to_the_disk(received: ReceivedImages) -> None:
    (received.path / "inventory.img").write_bytes(b"inventorx")
    with pytest.raises(TargetError, match="is damaged"):
        received.persist()
    assert list(image_places.DISK.iterdir()) == []
    assert (received.path / "pages-1.img").exists()


def test_a_disk_that_is_full_leaves_them_in_memory(received: ReceivedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        received.persist()
    assert list(image_places.DISK.iterdir()) == []
    received.verify()
    again = ReceivedImages.existing(MIGRATION)
    assert again is not None
    assert (again.kind, again.has_manifest) == ("memory", True)
    again.remove()


def test_what_is_whole_is_found(received: ReceivedImages) -> None:
    """In memory only when all had come; on the disk also without a manifest, as earlier versions left it."""
    received.persist(keep=True)
    found = ReceivedImages.existing(MIGRATION)
    assert found is not None
    assert found.kind == "memory"
    with pytest.raises(TargetError, match="another process uses"):
        _existing_soon()
    found.leave()
    (image_places.MEMORY / MIGRATION).mkdir(parents=True, exist_ok=True)
    found = ReceivedImages.existing(MIGRATION)
    assert found is not None
    assert found.kind == "disk"
    found.leave()
    (image_places.DISK / MIGRATION / "manifest.json").unlink()
    found = ReceivedImages.existing(MIGRATION)
    assert found is not None
    assert (found.kind, found.has_manifest) == ("disk", False)
    found.verify()
    found.remove()
    assert ReceivedImages.existing(MIGRATION) is None
    assert not image_places.MEMORY.exists()


def _existing_soon() -> None:
    timeout, images_module.IMAGES_LOCK_TIMEOUT = images_module.IMAGES_LOCK_TIMEOUT, 0.0
    try:
        ReceivedImages.existing(MIGRATION)
    finally:
        images_module.IMAGES_LOCK_TIMEOUT = timeout


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"format": 2}', '{"format": 1, "images": {}}',
        '{"format": 1, "migration": "x", "boot": "x", "images": {"a.img": [1, "beef"]}}',
        '{"format": 1, "migration": "x", "boot": "x", "images": {"a.img": 1}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(received: ReceivedImages, text: str) -> None:
    (received.path / "manifest.json").write_text(text)
    with pytest.raises(MigrateError, match=r"/manifest\.json: "):
        received.verify()
