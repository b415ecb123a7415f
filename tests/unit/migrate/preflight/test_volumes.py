"""What is decided about mounts from their text alone: network file systems, --volume, places, layers of overlays."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import ProtocolError, UsageError
from migrate.files import marks, mountinfo
from migrate.files.scan import Scan, again, scan
from migrate.files.trees import Needed, Owner, Tree, is_place
from migrate.preflight.volumes import Plan, _layers, parse
from migrate.wire import records
from migrate.wire.questions import Seen
from runtime.spec.mounts import Mount

MOUNTS = """
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
35 22 0:31 / /srv rw,relatime shared:17 - nfs4 filer:/export/srv rw,vers=4.2,addr=192.0.2.7
36 35 0:32 /sub /srv/win\\040dows rw - cifs //files/share rw,vers=3.1.1
37 22 0:33 / /mnt/g rw - fuse.glusterfs gl1:/vol0 rw,user_id=0
38 22 0:34 / /mnt/v rw shared:9 master:2 - virtiofs tag rw
40 22 0:36 / /mnt/odd\x85\x0bname rw - nfs4 filer:/odd rw
39 22 0:35 / /mnt/s rw - fuse.sqfuse x rw
41 22 0:37 / /mnt/c rw - ceph mon2:6789,mon1:6789:/dir rw
42 22 0:38 / /mnt/h rw - fuse.sshfs me@host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "export"),
    [
        ("/srv/a/b", "nfs", "filer:/export/srv/a/b"),
        ("/srv", "nfs", "filer:/export/srv"),
        ("/srv/win dows/x", "cifs", "//files/share/sub/x"),
        ("/mnt/g/x", "glusterfs", "gl1:/vol0/x"),
        ("/mnt/odd\x85\x0bname/x", "nfs", "filer:/odd/x"),
        ("/mnt/v", "virtiofs", "tag /"),
        ("/mnt/c/x", "ceph", "mon1:6789,mon2:6789:/dir/x"),
        ("/mnt/h/x", "sshfs", "me@host: /x"),
        ("/mnt/s", "", "x /"),
        ("/srvx", "", "/dev/nvme0n1p2 /srvx"),
    ],
)
def test_network_file_systems_are_recognised(path: str, kind: str, export: str) -> None:
    mount = mountinfo.holding(path, mountinfo.parse(MOUNTS))
    assert mount is not None
    assert (mount.network, mount.export(path)) == (kind, export)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (
            "/ /srv rw - nfs4 filer:/export rw,vers=4.2,hard",
            "/ /srv/a rw,ro - nfs filer:/export/a ro,soft,vers=3",
            True,
        ),
        ("/a /srv/a rw - nfs4 filer:/export rw", "/ /srv/a rw - nfs4 filer:/export/a/ rw", True),
        ("/ /srv rw - cifs //Files/Share rw", r"/ /srv rw - smb3 \134\134files\134share rw", True),
        ("/ /srv rw - ceph b:1,a:1:/ rw", "/ /srv rw - ceph a:1,b:1:/ rw", True),
        ("/ /srv rw - nfs4 filer:/export rw", "/ /srv rw - nfs4 filer:/other rw", False),
        ("/ /srv rw - nfs4 filer:/export rw", "/x /srv rw - nfs4 filer:/export rw", False),
        ("/ /srv rw - nfs4 filer:/export rw", "/ /srv rw - nfs4 other:/export rw", False),
        ("/ /srv rw - fuse.sshfs me@host: rw", "/ /srv rw - fuse.sshfs me@host:/ rw", False),
        ("/ /srv rw - 9p tag rw", "/a /srv rw - 9p tag rw", False),
    ],
)
def test_exports_are_the_same_however_they_are_mounted(one: str, other: str, same: bool) -> None:
    found = [mountinfo.holding("/srv/a", mountinfo.parse(f"1 2 0:3 {line}")) for line in (one, other)]
    assert (len({mount and mount.export("/srv/a") for mount in found}) == 1) is same


def test_volume_options() -> None:
    assert parse(["/a=copy", "/b/=shared", "//c=/d"]) == {"/a": "copy", "/b": "shared", "/c": "/d"}
    for bad in ("a=copy", "/a", "/a=", "/a=b", "/a=/b/../c"):
        with pytest.raises(UsageError, match="--volume"):
            parse([bad])
    with pytest.raises(UsageError, match="is given twice"):
        parse(["/a=copy", "/a/=shared"])


@pytest.mark.parametrize(
    "path",
    ["", "/", "x", "/a/../b", "/a/", "//a", "/proc/x", "/run/x", "/dev", "/var/lib/pymigrate/trees", "/a\0"],
)
def test_no_tree_is_put_there(path: str) -> None:
    assert not is_place(path)
    with pytest.raises(ProtocolError):
        Tree("x", "/x", path).check()


def test_trees_survive_the_wire_and_nothing_else_does() -> None:
    tree, needed = Tree("/data", "/srv/a", "/srv/a"), Needed("/data", "/srv/a", True)
    for record in (tree, needed, Seen("/x", 5)):
        value = records.encode(record)
        assert records.decode(type(record), value, "it") == record
        for bad in (None, {}, value | {"more": 1}, value | {"path": 1, "place": 1}):
            with pytest.raises(ProtocolError):
                records.decode(type(record), bad, "it")


def test_layers_of_an_overlay() -> None:
    options = (r"lowerdir=/a:/b\:c", "upperdir=/u", "workdir=/w", "index=on")
    found = _layers(Mount("/x", "overlay", "overlay", options))
    assert found == {"lowerdir": ["/a", "/b:c"], "upperdir": ["/u"], "workdir": ["/w"]}


def test_config_names_the_new_source() -> None:
    value = {"mounts": [{"destination": "/data/", "source": "/a"}, {"destination": "/x", "source": "/y"}], "other": 1}
    for source in ("/a", "/b"):
        mounts = [{"destination": "/data/", "source": source}, {"destination": "/x", "source": "/y"}]
        assert json.loads(Plan(sources=(("/data", source),)).config(value)) == {"mounts": mounts, "other": 1}
    assert json.loads(Plan().config({"other": 1})) == {"other": 1}


def test_what_changed_within_a_tick_counts_as_changed() -> None:
    second = 1_000_000_000
    old, young = (1, 5 * second + 1, 0, 3, 0o100644), (2, 9 * second - 1, 0, 3, 0o100644)
    before = Scan(9 * second, {b"old": old, b"young": young, b"gone": old})
    after = Scan(12 * second, {b"old": old, b"young": young, b"new": old})
    assert sorted(after.since(before)) == [b"gone", b"new", b"young"]
    assert sorted(after.since(before, {1})) == [b"gone", b"new", b"old", b"young"]


DIRECTORY, LINK, FILE = 0o040755, 0o120777, 0o100644


def test_what_has_gone_with_its_directory_is_not_named_again() -> None:
    """rsync would follow the link that is there instead, and make a directory of it."""
    top, below = (1, 0, 0, 0, DIRECTORY), (2, 0, 0, 0, DIRECTORY)
    files = {b"d/f": (3, 0, 0, 0, FILE), b"d/e": (4, 0, 0, 0, DIRECTORY), b"d/e/f": (5, 0, 0, 0, FILE)}
    before = Scan(1 << 60, {b".": top, b"d": below, **files})
    assert Scan(1 << 61, {b".": top}).since(before) == [b"d"]
    assert Scan(1 << 61, {b".": top, b"d": (6, 0, 0, 4, LINK)}).since(before) == [b"d"]
    assert sorted(Scan(1 << 61, {b".": top, b"d": below}).since(before)) == [b"d/e", b"d/f"]


def test_a_look_does_not_leave_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that becomes a link to another one while we look."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").touch()
    (tmp_path / "tree" / "d").mkdir(parents=True)
    original = os.open

    def replacing(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == os.fsencode(tmp_path / "tree" / "d") and not (tmp_path / "tree" / "d").is_symlink():
            (tmp_path / "tree" / "d").rmdir()
            (tmp_path / "tree" / "d").symlink_to(tmp_path / "outside")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", replacing)
    assert set(scan(str(tmp_path / "tree")).entries) == {b".", b"d"}


def is_of(path: str, owner: Owner) -> bool:
    mark = marks.of(path)
    return mark is not None and mark.is_of(owner)


def test_a_mark_is_not_of_another_directory_with_the_same_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "MARKS", tmp_path / "marks")
    place = tmp_path / "data"
    place.mkdir()
    owner = Owner("web", "2026-11-24", "/run/root")
    marks.put(str(place), owner, "m", whole=True)
    assert is_of(str(place), owner)
    number = place.stat().st_ino
    for _ in range(50):
        place.rmdir()
        place.mkdir()
        if place.stat().st_ino == number:
            break
    assert not is_of(str(place), owner)


def test_a_mark_is_not_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But while a move renews it, it is replaced."""
    monkeypatch.setattr(marks, "MARKS", tmp_path / "marks")
    place, owner = tmp_path / "file", Owner("web", "2026-11-24", "/run/root")
    for whole in (True, False):
        place.touch()
        marks.put(str(place), owner, "m", whole=whole)
        (tmp_path / "new").touch()
        (tmp_path / "new").rename(place)
        assert is_of(str(place), owner) is not whole


def test_what_was_there_only_for_a_moment_is_not_named(tmp_path: Path) -> None:
    """CRIU makes a directory in /tmp while it dumps, and removes it."""
    (tmp_path / "kept" / "below").mkdir(parents=True)
    earlier = scan(str(tmp_path))
    made = tmp_path / "cr-tmpfs.a1b2c3" / "inside"
    made.mkdir(parents=True)
    (made / "file").write_text("x")
    (tmp_path / "link_remap.1").write_text("new")
    beside = scan(str(tmp_path))
    shutil.rmtree(made.parent)
    after = again(str(tmp_path), beside)
    assert after.entries.keys() == {b".", b"kept", b"kept/below", b"link_remap.1"}
    assert after.entries.keys() - earlier.entries.keys() == {b"link_remap.1"}


def test_a_look_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="too long"):
        scan(str(tmp_path), until=lambda: 0.0)
    with pytest.raises(TimeoutError, match="too long"):
        again(str(tmp_path), scan(str(tmp_path)), lambda: 0.0)
