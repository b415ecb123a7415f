"""Places at a target: which one a container gets, and what is never written to or removed."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.files import marks, receivers
from migrate.files.fingerprint import fingerprint
from migrate.files.trees import Owner, Tree
from migrate.journal import journal
from migrate.journal.journal import Journal
from migrate.phases import Phase
from migrate.target import bundles, places
from migrate.target.bundles import Chooser, Chosen
from migrate.target.files import Arriving
from migrate.target.places import Locks, Uses
from migrate.target.trees import Arrivals
from runtime.linux import processes
from runtime.state.record import State
from runtime.state.store import Store

FIRST, SECOND = "20260101T000000-0000000000000001", "20260101T000000-0000000000000002"
NEITHER = "20260101T000000-0000000000000003"
CONFIG = {"root": {"path": "rootfs", "readonly": True}, "process": {"args": ["sh"]}}


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A host's directories, all below one."""
    monkeypatch.setattr(marks, "MARKS", tmp_path / "trees")
    monkeypatch.setattr(places, "LOCKS", tmp_path / "places")
    monkeypatch.setattr(places, "DEFAULT_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(bundles, "BUNDLES", tmp_path / "bundles")
    monkeypatch.setattr(receivers, "DIRECTORY", tmp_path / "receiving")
    directory = tmp_path / "migrations"
    for function in (*vars(journal).values(), Journal.begin.__func__, Journal.resume.__func__):  # type: ignore[attr-defined]
        if "directory" in (getattr(function, "__kwdefaults__", None) or {}):
            monkeypatch.setitem(function.__kwdefaults__, "directory", directory)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("content")
    return tmp_path


@pytest.fixture
def alice(host: Path) -> Owner:
    return Owner("web", "2026-01-01", str(host / "root"))


@pytest.fixture
def bob(host: Path) -> Owner:
    """The same id."""
    return Owner("web", "2026-02-02", str(host / "root"))


def choose(host: Path, owner: Owner, migration: str, *hints: Path, locks: Locks | None = None) -> tuple[Chosen, str]:
    """The choice for a container with a constant root file system, and what is said about it."""
    config = json.loads(json.dumps(CONFIG))
    held = locks or Locks()
    chooser = Chooser(config, fingerprint(host / "source"), owner, migration, held)
    chosen = chooser.choose(map(str, hints))
    chosen.mark(owner, migration)
    if locks is None:
        held.release()
    return chosen, " ".join(chooser.notes)


def fill(host: Path, bundle: Path, content: str = "") -> Path:
    """What a move puts into a place; what the source has, unless there is other `content`."""
    (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", f"{host}/source/.", bundle / "rootfs"], check=True)
    if content:
        (bundle / "rootfs" / "file").write_text(content)
    (bundle / "config.json").write_text(json.dumps(CONFIG))
    return bundle


def brought(host: Path, owner: Owner, migration: str = FIRST) -> Path:
    """A place of a container that has moved here."""
    chosen, _ = choose(host, owner, migration)
    fill(host, chosen.bundle)
    marks.put(str(chosen.bundle), owner, migration, whole=True)
    return chosen.bundle


def live(root: Path, bundle: Path, rootfs: Path | None = None) -> None:
    """A container that lives, as this process does."""
    store = Store(root)
    directory = store.create("other")
    pid = os.getpid()
    state = State(
        id="other",
        bundle=str(bundle),
        rootfs=str(rootfs or bundle / "rootfs"),
        created="2026",
        log_path=f"{directory}/log",
        pid=pid,
        pid_start_time=processes.start_time(pid),
    )
    store.save(state)


def undecided(owner: Owner, migration: str, **fields: Any) -> None:
    log = Journal.begin(
        migration, role="target", id=owner.id, source="s", target="t", created=owner.created, root=owner.root, **fields
    )
    for phase in (Phase.SEED, Phase.STOP_AND_COPY, Phase.PREPARED):
        log.record(phase)


def test_a_container_gets_its_own_place_again_and_no_other_does(host: Path, alice: Owner, bob: Owner) -> None:
    place = brought(host, alice)
    (host / "source" / "file").write_text("changed")
    assert choose(host, bob, SECOND)[0].bundle == host / "bundles" / "web.2"
    again, _ = choose(host, alice, NEITHER)
    assert (again.bundle, again.made, again.complete) == (place, False, False)
    elsewhere = Owner(alice.id, alice.created, "/run/other")
    assert choose(host, elsewhere, NEITHER[:-1] + "4")[0].bundle == host / "bundles" / "web.3"


def test_what_is_complete_is_used_as_it_is(host: Path, alice: Owner) -> None:
    place = brought(host, alice)
    again, _ = choose(host, alice, SECOND)
    assert (again.bundle, again.complete) == (place, True)
    (place / "config.json").unlink()
    again, _ = choose(host, alice, SECOND)
    assert (again.bundle, again.complete) == (place, True), "config.json is written again anyway"


def test_what_a_failed_move_has_left_is_not_taken_as_complete(host: Path, alice: Owner, bob: Owner) -> None:
    place = brought(host, alice)
    marks.put(str(place), alice, FIRST, whole=False)
    assert choose(host, bob, SECOND)[0].bundle != place
    again, _ = choose(host, alice, NEITHER)
    assert (again.bundle, again.complete) == (place, False)


@pytest.mark.parametrize("content", ["", "other"])
def test_a_place_without_a_mark_is_taken_over_only_if_it_fits(host: Path, alice: Owner, content: str) -> None:
    place = fill(host, host / "bundles" / "web", content)
    chosen, notes = choose(host, alice, FIRST)
    assert (chosen.bundle == place, chosen.complete, str(place) in notes) == (
        (False, False, True) if content else (True, True, False)
    )
    assert (place / "rootfs" / "file").read_text() == content or "content"
    assert marks.of(str(chosen.bundle)) is not None


def test_a_place_without_a_mark_is_left_alone_while_it_is_used(host: Path, alice: Owner) -> None:
    place = fill(host, host / "bundles" / "web")
    live(host / "root", place)
    chosen, notes = choose(host, alice, FIRST, place)
    assert chosen.bundle == host / "bundles" / "web.2"
    assert f"{place} is left alone: container other" in notes
    assert choose(host, alice, SECOND, place)[0].bundle == chosen.bundle


def test_the_place_of_a_container_that_is_no_more_is_taken_if_it_fits(host: Path, alice: Owner, bob: Owner) -> None:
    """Nothing in it changes."""
    place = brought(host, alice)
    assert choose(host, bob, SECOND)[0] == Chosen(place, place / "rootfs", is_place=True, complete=True, adopted=True)
    marks.put(str(place / "rootfs"), alice, FIRST, whole=True)  # one that the container could write to
    marks.put(str(place), alice, FIRST, whole=True)
    assert choose(host, bob, SECOND)[0].bundle != place


def test_an_undecided_move_keeps_its_place(host: Path, alice: Owner, bob: Owner) -> None:
    place = brought(host, alice)
    undecided(alice, FIRST, bundle=str(place))
    assert choose(host, bob, SECOND)[0].bundle != place
    mark = marks.of(str(place))
    assert mark is not None
    assert "not decided" in places.remove(mark, Uses.now())
    assert (place / "rootfs" / "file").exists()


def test_two_moves_at_once_get_two_places(host: Path, alice: Owner) -> None:
    """Of the same container, even: the agent of the first may be stopped."""
    first, second = Locks(), Locks()
    a, _ = choose(host, alice, FIRST, locks=first)
    b, _ = choose(host, alice, SECOND, locks=second)
    assert a.bundle != b.bundle
    first.release()
    assert second.hold(str(a.bundle))
    second.release()
    assert not list((host / "places").iterdir())


def test_a_lock_ends_with_its_process(host: Path) -> None:
    ready, go = os.pipe()
    if (pid := os.fork()) == 0:
        Locks().hold("/srv/x")
        locks = Locks()
        locks.hold("/srv/data")
        os.write(go, b"x")
        signal.pause()
    os.read(ready, 1)
    assert not Locks().hold("/srv/data")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    locks = Locks()
    assert locks.hold("/srv/data")
    locks.release()


def test_a_snapshot_that_was_restored_from_a_place_keeps_it(host: Path, alice: Owner) -> None:
    """`snapshot restore --rootfs`: its bundle is the snapshot."""
    place = brought(host, alice)
    live(host / "root", host / "snapshot", place / "rootfs")
    assert choose(host, alice, SECOND)[0].bundle != place


def test_an_operators_bundle_is_read_by_many_and_never_written_to(host: Path, alice: Owner) -> None:
    bundle = fill(host, host / "operators")
    live(host / "root", bundle)
    chosen, _ = choose(host, alice, FIRST, bundle)
    assert chosen == Chosen(bundle, bundle / "rootfs", is_place=False, complete=True)
    assert list(marks.every()) == []
    (bundle / "rootfs" / "file").write_text("changed")
    assert choose(host, alice, SECOND, bundle)[0].bundle == host / "bundles" / "web"


@pytest.mark.parametrize("used", [False, True])
def test_an_operators_writable_root_is_not_renewed_while_another_runs_from_it(
    host: Path, alice: Owner, used: bool
) -> None:
    bundle = fill(host, host / "operators")
    marks.put(str(bundle / "rootfs"), alice, FIRST, whole=True)  # as `treestore.leave` does
    if used:
        live(host / "root", bundle)
    chooser = Chooser(json.loads(json.dumps(CONFIG)), "", alice, SECOND, Locks())
    assert (chooser.choose([str(bundle)]).bundle == bundle) is not used


def test_a_hint_that_leads_into_anothers_place_is_not_followed(host: Path, alice: Owner, bob: Owner) -> None:
    place = brought(host, alice)
    (host / "operators").mkdir()
    (host / "operators" / "rootfs").symlink_to(place / "rootfs")
    (host / "operators" / "config.json").write_text(json.dumps(CONFIG))
    (host / "alias").symlink_to(place)
    chosen, _ = choose(host, bob, SECOND, host / "operators", host / "alias", host / "bundles" / ".." / "bundles")
    assert chosen.is_place


def tree(host: Path, place: Path, **fields: Any) -> Tree:
    return Tree("/data", str(host / "source"), str(place), **fields)


@pytest.fixture
def arrive(host: Path) -> Callable[..., tuple[Arrivals, Path]]:
    def bring(owner: Owner, migration: str, size: int = 10) -> tuple[Arrivals, Path]:
        place = host / "srv" / "a" / "data"
        locks = Locks()
        arrivals = Arrivals.plan([tree(host, place)], owner, migration, locks)
        arrivals.make()
        (place / "big").write_bytes(os.urandom(size))
        locks.release()
        return arrivals, place

    return bring


def undo(arrivals: Arrivals) -> None:
    arrivals.undo()
    arrivals._locks.release()


def test_a_failed_move_keeps_much_and_removes_little(
    host: Path, alice: Owner, bob: Owner, arrive: Callable[..., tuple[Arrivals, Path]]
) -> None:
    arrivals, place = arrive(alice, FIRST)
    undo(arrivals)
    assert not (host / "srv").exists()
    assert places.leftovers() == []
    arrivals, place = arrive(alice, FIRST, places.WORTH_KEEPING)
    undo(arrivals)
    (left,) = places.leftovers()
    assert (left.path, left.id, left.whole) == (str(place), "web", False)
    locks = Locks()
    with pytest.raises(Exception, match="no move of this container brought it"):
        Arrivals.plan([tree(host, place)], bob, SECOND, locks)
    Arrivals.plan([tree(host, place)], alice, SECOND, locks)
    assert places.clean(left) == "a move is at work there"
    locks.release()
    (host / "srv" / "mine").touch()
    assert places.clean(left) == ""
    assert sorted(path.name for path in (host / "srv").iterdir()) == ["mine"]
    assert list((host / "trees").iterdir()) == []


def test_an_undo_touches_nothing_that_is_anothers_by_now(
    host: Path, alice: Owner, bob: Owner, arrive: Callable[..., tuple[Arrivals, Path]]
) -> None:
    arrivals, place = arrive(alice, FIRST)
    marks.put(str(place), bob, SECOND, whole=True)
    arrivals.undo()
    assert (place / "big").exists()
    (place / "big").unlink()
    place.rmdir()
    place.mkdir()  # somebody's, at the same path
    (place / "precious").touch()
    arrivals.undo()
    assert (place / "precious").exists()


def test_nothing_is_made_within_anothers_place(
    host: Path, alice: Owner, bob: Owner, arrive: Callable[..., tuple[Arrivals, Path]]
) -> None:
    _, place = arrive(alice, FIRST)
    with pytest.raises(Exception, match="belongs to container web"):
        Arrivals.plan([tree(host, place / "below")], bob, SECOND, Locks())


def test_what_appears_after_the_plan_is_not_taken(host: Path, alice: Owner) -> None:
    place = host / "data"
    arrivals = Arrivals.plan([tree(host, place)], alice, FIRST, Locks())
    place.mkdir()
    (place / "precious").touch()
    with pytest.raises(Exception, match="somebody else has made it meanwhile"):
        arrivals.make()
    arrivals.undo()
    assert (place / "precious").exists()


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_a_copy_is_neither_renewed_nor_removed_while_a_container_has_it_mounted(
    host: Path, alice: Owner, arrive: Callable[..., tuple[Arrivals, Path]], where: str
) -> None:
    """In whatever root its state is, if a mark or a journal names that."""
    arrivals, place = arrive(alice, FIRST, places.WORTH_KEEPING)
    undo(arrivals)
    other = Owner("other", "2026", str(host / where))
    (host / "known").mkdir()
    marks.put(str(host / "known"), other, NEITHER, whole=True)
    live(host / where, host / "operators")
    config = {"mounts": [{"destination": "/d", "source": str(place), "options": ["bind"]}]}
    (host / where / "other" / "config.json").write_text(json.dumps(config))
    locks = Locks()
    with pytest.raises(Exception, match="cannot be renewed: container other"):
        Arrivals.plan([tree(host, place)], alice, SECOND, locks)
    locks.release()
    (left,) = places.leftovers()
    assert "container other" in places.clean(left)
    assert (place / "big").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_root_that_nobody_knows_shows_by_its_mounts(host: Path, alice: Owner) -> None:
    place = brought(host, alice)
    script = f"mount --make-rprivate / && mount --bind {place}/rootfs /mnt && echo && exec sleep 60"
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert Uses.now().of(str(place)) == f"process {process.pid} has it mounted"
        assert Uses.now().of(str(host / "source")) == ""
    finally:
        process.kill()
        process.communicate()


def test_what_a_container_has_left_is_never_removed(host: Path, alice: Owner) -> None:
    """An operator has made it; its renewal by the move back has failed."""
    place = host / "operators-data"
    place.mkdir()
    (place / "precious").touch()
    marks.put(str(place), alice, FIRST, whole=True)
    arrivals = Arrivals.plan([tree(host, place)], alice, SECOND, Locks())
    arrivals.make()
    arrivals.undo()
    assert places.leftovers() == []
    mark = marks.of(str(place))
    assert mark is not None
    assert "moves have not made it" in places.remove(mark, Uses.now())
    assert (place / "precious").exists()


def test_leftovers_are_those_of_failed_moves(host: Path, alice: Owner, bob: Owner) -> None:
    brought(host, alice)
    cut, _ = choose(host, Owner("cut", "2026", "/run/x"), SECOND)
    log = Journal.begin(SECOND, role="target", id="cut", source="s", target="t", agent={"pid": 0, "start_time": None})
    log.record(Phase.SEED)
    assert [mark.path for mark in places.leftovers()] == [str(cut.bundle)]
    log.record(Phase.STOP_AND_COPY)
    assert places.leftovers() == [], "it may have been decided"


def test_marks_of_earlier_versions_and_damaged_ones(host: Path, alice: Owner, bob: Owner) -> None:
    place = host / "data"
    place.mkdir()
    marks.put(str(place), alice, FIRST, whole=True)
    (file,) = (host / "trees").iterdir()
    old = {"path": str(place), "owner": f"{alice.id} {alice.created}", "inode": marks.inode(str(place))}
    file.write_text(json.dumps(old | {"migration": FIRST, "whole": True}))
    mark = marks.of(str(place))
    assert mark is not None
    assert (mark.is_of(alice), mark.is_of(bob), mark.is_made) == (True, False, False)
    for text in ("", "{", "[]", json.dumps(old | {"version": 99}), json.dumps(old | {"inode": 5})):
        file.write_text(text)
        mark = marks.of(str(place))
        assert mark is not None, text
        assert not mark.is_of(alice)


def test_a_journal_of_an_earlier_version_removes_no_place(host: Path, alice: Owner, bob: Owner) -> None:
    """It says that the move made the bundle, which bears no mark: another may run from it by now."""
    bundle = fill(host, host / "bundles" / "web")
    Journal.begin(
        FIRST, role="target", id="web", source="s", target="t", bundle=str(bundle), made_bundle=True, trees=[]
    )
    entry = journal.load(FIRST)
    assert entry is not None
    files = Arriving.resume(entry, alice)
    assert files.bundle == bundle
    files.undo()
    assert (bundle / "rootfs" / "file").exists()
    files.confirm()


def test_a_journal_of_this_version_removes_only_what_bears_its_mark(host: Path, alice: Owner, bob: Owner) -> None:
    for owner, gone in ((alice, True), (bob, False)):
        chosen, _ = choose(host, alice, FIRST)
        fill(host, chosen.bundle)
        marks.put(str(chosen.bundle), owner, FIRST if gone else SECOND, whole=False)
        Journal.begin(
            FIRST[:-1] + str(gone + 5), role="target", id="web", source="s", target="t", bundle=str(chosen.bundle),
            place=str(chosen.bundle), made=[str(chosen.bundle)],
        )  # fmt: skip
        entry = journal.load(FIRST[:-1] + str(gone + 5))
        assert entry is not None
        Arriving.resume(entry.replace(migration=FIRST), alice).undo()
        assert chosen.bundle.exists() is not gone


def test_a_damaged_journal_keeps_what_it_refers_to(host: Path, alice: Owner, bob: Owner) -> None:
    place = brought(host, alice)
    undecided(alice, FIRST, bundle=str(place))
    Journal.resume(journal.load(FIRST)).record(Phase.ABORTED)  # type: ignore[arg-type]
    assert Uses.now().of(str(place)) == ""
    path = host / "migrations" / f"{FIRST}.jsonl"
    path.write_bytes(path.read_bytes().replace(b"prepared", b"prepaxed"))
    assert "not decided" in Uses.now().of(str(place))
