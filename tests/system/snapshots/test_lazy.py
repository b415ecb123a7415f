"""Snapshots whose memory comes while the container runs: every page is verified before the program gets it."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from criu_rpc.errors import CriuError
from migrate.memory import image_source
from migrate.memory.handler import PageHandler
from migrate.memory.layout import BLOCK, PAGE
from migrate.snapshots.restore import restore
from runtime.checkpoint.restore import Restoring
from runtime.errors import Conflict
from runtime.spec.default import default_spec
from runtime.state import lazy
from runtime.state.record import State
from runtime.state.store import Store
from tests.bench import writer
from tests.bench.writer import Seen
from tests.system.conftest import Local
from tests.system.memory.lazy_restore import group_of, kill, wait_for

MIB, RATE = 160, 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writer.build(tmp_path_factory.mktemp("program"))


@pytest.fixture
def snapshot(pymigrate: Local, program: Path, tmp_path: Path) -> Path:
    """A snapshot of a program that holds MIB of memory; nothing else is left of it."""
    for name in ("dev", "proc", "sys", "tmp"):
        (tmp_path / "bundle" / "rootfs" / name).mkdir(parents=True)
    shutil.copy(program, tmp_path / "bundle" / "rootfs" / "writer")
    config = default_spec()
    config["process"]["args"] = ["/writer", str(MIB), str(RATE)]
    config["linux"]["cgroupsPath"] = f"/pymigrate/test-{os.getpid()}-lazy"
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", tmp_path / "bundle", "c")
    wait_for(lambda: said(pymigrate, "c").ready, "the program does not fill its memory")
    pymigrate("snapshot", "save", "--stop", "c", tmp_path / "snap")
    pymigrate("delete", "c")
    return tmp_path / "snap"


def said(pymigrate: Local, container: str) -> Seen:
    return writer.parse(pymigrate("logs", container).stdout)


def require_right(pymigrate: Local, container: str) -> None:
    """The memory is in place, and the program finds all words right."""
    wait_for(lambda: "memory" not in json.loads(pymigrate("state", container).stdout), "memory is still missing")
    pymigrate("kill", container, "USR1")
    wait_for(lambda: said(pymigrate, container).checked, "the program does not check its memory")
    assert said(pymigrate, container).bad == 0


def contents(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Return what must not change of the files of a snapshot."""
    found = {}
    for path in sorted(directory.rglob("*.*")):
        info = path.stat()
        found[path.name] = info.st_mtime_ns, info.st_blocks, hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def restore_then(
    pymigrate: Local, snapshot: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[list[int]], object]
) -> State:
    """Restore, and do something with the page handler's processes when the container runs and it fills nothing yet."""
    resumed = PageHandler.resumed

    def patched(handler: PageHandler) -> None:
        found = lazy.read(str(pymigrate.root / "c" / lazy.NOTE))
        assert found is not None
        act(group_of(found.group))
        resumed(handler)

    monkeypatch.setattr(PageHandler, "resumed", patched)
    return restore(Store(pymigrate.root), snapshot)


def signal_all(pids: list[int], number: int) -> None:
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, number)


def test_two_restores_of_one_snapshot(pymigrate: Local, snapshot: Path) -> None:
    before = contents(snapshot)
    first = json.loads(pymigrate("--json", "snapshot", "restore", snapshot).stdout)
    assert first["memory"]["total"] > MIB << 20
    require_right(pymigrate, "c")
    pymigrate("delete", "-f", "c")
    done = pymigrate("snapshot", "restore", snapshot)
    assert "MiB left" in done.stdout
    require_right(pymigrate, "c")
    assert contents(snapshot) == before


def test_eager(pymigrate: Local, snapshot: Path) -> None:
    assert "memory" not in json.loads(pymigrate("--json", "snapshot", "restore", "--eager", snapshot).stdout)
    require_right(pymigrate, "c")


def test_a_damaged_block_ends_the_container(pymigrate: Local, snapshot: Path) -> None:
    image = snapshot / "images" / "pages-1.img"
    place = image.stat().st_size // 2
    flip(image, place)
    start = place // BLOCK * BLOCK
    words = f"{image}: is damaged between byte {start} and {start + BLOCK}"
    for verb in (("restore", "--eager"), ("show",)):
        done = pymigrate("snapshot", *verb, snapshot, check=False)
        assert (done.returncode, words in done.stderr) == (6, True), done.stderr
    assert not (pymigrate.root / "c").exists()
    done = pymigrate("snapshot", "restore", snapshot, check=False)
    if done.returncode:  # the program needed that block before the restore was over
        assert (done.returncode, words in done.stderr, (pymigrate.root / "c").exists()) == (6, True, False)
        return
    wait_for(lambda: json.loads(pymigrate("state", "c").stdout)["status"] == "stopped", "it goes on without its memory")
    group = lazy.read(str(pymigrate.root / "c" / lazy.NOTE))
    assert group is not None
    wait_for(lambda: not group_of(group.group), "the page handler does not end")
    memory = json.loads(pymigrate("state", "c").stdout)["memory"]
    assert (memory["damaged"], memory["failure"]) == (True, words)
    assert "stopped (memory: damaged)" in pymigrate("list").stdout
    logs = pymigrate("logs", "c")
    assert f"[pymigrate: the container is killed: {words}]" in logs.stdout + logs.stderr
    assert said(pymigrate, "c").bad == 0
    pymigrate("delete", "c")


def test_a_damaged_block_that_criu_reads_is_found_before(pymigrate: Local, snapshot: Path) -> None:
    images = os.open(snapshot / "images", os.O_RDONLY)
    try:
        (space,) = image_source.read(images).values()
    finally:
        os.close(images)
    run = next(run for run in space.runs if not run.is_lazy)
    flip(snapshot / "images" / space.name, run.place + PAGE // 2)
    done = pymigrate("snapshot", "restore", snapshot, check=False)
    assert (done.returncode, f"{space.name}: is damaged between" in done.stderr) == (6, True), done.stderr
    assert not (pymigrate.root / "c").exists()


def test_killed_page_handlers(pymigrate: Local, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 0

    def act(pids: list[int]) -> None:
        nonlocal kills
        note = str(pymigrate.root / "c" / lazy.NOTE)
        for number in range(6):
            found = lazy.read(note)
            assert found is not None
            wait_for(lambda group=found.group: len(group_of(group)) == 2, "a killed process was not replaced")
            kill(group_of(found.group)[number % 2])
            kills += 1

    restore_then(pymigrate, snapshot, monkeypatch, act)
    assert kills == 6
    require_right(pymigrate, "c")


def test_all_page_handlers_are_killed(pymigrate: Local, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(pids: list[int]) -> None:
        os.killpg(os.getpgid(pids[0]), signal.SIGKILL)

    state = restore_then(pymigrate, snapshot, monkeypatch, act)
    wait_for(lambda: (found := lazy.left(state)) is not None and found.is_damaged, "the damage is not reported")
    assert "(memory: damaged)" in pymigrate("list").stdout
    pymigrate("delete", "-f", "c")


def test_a_snapshot_that_is_removed_meanwhile(
    pymigrate: Local, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def act(pids: list[int]) -> None:
        signal_all(pids, signal.SIGSTOP)
        held.extend(pids)

    state = restore_then(pymigrate, snapshot, monkeypatch, act)
    try:
        shutil.rmtree(snapshot)
        found = lazy.left(state)
        assert found is not None
        assert found.left > MIB << 19
        with pytest.raises(Conflict, match="not in place yet"):
            lazy.require_whole(state, "save")
    finally:
        signal_all(held, signal.SIGCONT)
    require_right(pymigrate, "c")


def test_a_restore_that_fails_leaves_nothing(pymigrate: Local, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    def fail(_: Restoring) -> State:
        found = lazy.read(str(pymigrate.root / "c" / lazy.NOTE))
        assert found is not None
        assert len(group_of(found.group)) == 2
        groups.append(found.group)
        raise CriuError("it cannot be resumed")

    monkeypatch.setattr(Restoring, "resume", fail)
    with pytest.raises(CriuError, match="it cannot be resumed"):
        restore(Store(pymigrate.root), snapshot)
    assert (group_of(groups[0]), list(pymigrate.root.glob("*"))) == ([], [])
    monkeypatch.undo()
    pymigrate("snapshot", "restore", snapshot)
    require_right(pymigrate, "c")
