"""What a target has on its disk before it counts images as safe there."""

from pathlib import Path

import pytest

from migrate.journal import journal
from migrate.journal.journal import Entry
from migrate.phases import Phase
from migrate.target import files as target_files
from migrate.target import image_places
from migrate.target.images import ReceivedImages

MIGRATION = "20260101T000000-0123456789abcdef"


def test_the_files_of_a_move_are_on_the_disk_before_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that is restored over older files than it had would be worse than none."""
    synced: list[str] = []
    fields = {"bundle": "/b", "rootfs": str(tmp_path), "created": "c", "root": "/r"}
    entry = Entry(MIGRATION, "target", "web", "host1", "host2", Phase.PREPARED, "", "", fields)
    monkeypatch.setattr(journal, "load", lambda _: entry)
    monkeypatch.setattr(journal.sync, "__kwdefaults__", {"directory": tmp_path / "migrations"})
    monkeypatch.setattr(target_files, "_sync", synced.append)
    monkeypatch.setattr(image_places, "DISK", tmp_path)
    path = tmp_path / MIGRATION
    path.mkdir()
    ReceivedImages(MIGRATION, path, "disk").persist()
    assert synced == [str(tmp_path)]
