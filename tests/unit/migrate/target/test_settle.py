"""Settling a move that cannot be taken over: what is here of it stays, whatever the phase that its journal has."""

import contextlib
import os
from pathlib import Path

import pytest

from migrate.errors import TargetError
from migrate.files import marks, receivers
from migrate.journal import journal
from migrate.journal.journal import Journal
from migrate.phases import Phase
from migrate.target import image_places, places, settle
from migrate.target.image_manifest import Manifest
from migrate.wire.protocol import Settle, Verdict
from runtime.state.store import Store

MIGRATION = "20260101T000000-0000000000000001"


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of an undecided move on the disk. Its journal lacks the line of PREPARED, which may be lost."""
    for name, place in (("PLACE", "run"), ("MEMORY", "run/memory"), ("DISK", "incoming")):
        monkeypatch.setattr(image_places, name, tmp_path / place)
    monkeypatch.setattr("migrate.target.images.IMAGES_LOCK_TIMEOUT", 0.0)
    monkeypatch.setattr(marks, "MARKS", tmp_path / "trees")
    monkeypatch.setattr(places, "LOCKS", tmp_path / "places")
    monkeypatch.setattr(receivers, "DIRECTORY", tmp_path / "receiving")
    for function in (*vars(journal).values(), Journal.begin.__func__, Journal.resume.__func__):  # type: ignore[attr-defined]
        if "directory" in (getattr(function, "__kwdefaults__", None) or {}):
            monkeypatch.setitem(function.__kwdefaults__, "directory", tmp_path / "migrations")
    log = Journal.begin(
        MIGRATION, role="target", id="web", source="a", target="b", root=str(tmp_path / "root"), created="2026",
        bundle=str(tmp_path / "bundle"), trees=[],
    )  # fmt: skip
    log.record(Phase.SEED)
    log.record(Phase.STOP_AND_COPY)
    path = tmp_path / "incoming" / MIGRATION
    path.mkdir(parents=True)
    (path / "inventory.img").write_bytes(b"inventory")
    Manifest.of(MIGRATION, path, {}).save(path, durable=False)
    return path


def decide(tmp_path: Path, verdict: Verdict) -> str:
    with contextlib.ExitStack() as later:
        return settle.settle(Store(tmp_path / "root"), Settle(MIGRATION, verdict), later).workload


@pytest.mark.parametrize("verdict", ["resume", "abort"])
def test_images_that_another_process_uses_stay(tmp_path: Path, images: Path, verdict: Verdict) -> None:
    fd = image_places.lock(images)
    assert fd is not None
    with pytest.raises(TargetError, match="another process uses these images"):
        decide(tmp_path, verdict)
    os.close(fd)
    assert (images / "inventory.img").exists()
    entry = journal.load(MIGRATION)
    assert entry is not None
    assert entry.phase is Phase.STOP_AND_COPY


def test_a_container_whose_images_are_damaged_is_at_neither_host_and_they_stay(tmp_path: Path, images: Path) -> None:
    (images / "inventory.img").write_bytes(b"invent")
    assert decide(tmp_path, "resume") == "NEITHER"
    assert (images / "inventory.img").exists()
    fd = image_places.lock(images)
    assert fd is not None, "they are left for another attempt"
    os.close(fd)


def test_an_abort_removes_them_and_may_be_asked_for_again(tmp_path: Path, images: Path) -> None:
    assert decide(tmp_path, "ask") == "UNKNOWN"
    assert (decide(tmp_path, "abort"), images.exists()) == ("SOURCE", False)
    assert (decide(tmp_path, "abort"), decide(tmp_path, "resume"), decide(tmp_path, "ask")) == (
        "SOURCE", "NEITHER", "SOURCE",
    )  # fmt: skip
