"""hooks: where, when and with what each of the six points runs, and what a failing one leads to."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.boxes import Fields, make, output, refusal, run
from tests.support.leaks import leaks, left
from tests.system.conftest import Local

POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
OUTSIDE = ("prestart", "createRuntime", "poststart", "poststop")
# A hook's facts, as lines: its point, state, root's first entries, mount and network namespace, arguments, environment.
_SAY = (
    'point=$1; read -r state; {{ echo "point $point"; echo "state $state"; echo "mnt $(readlink /proc/self/ns/mnt)"; '
    'echo "net $(readlink /proc/self/ns/net)"; echo "args $0 $*"; echo "env $A"; '
    'echo "inroot $([ -e /in-root ] && echo yes)"; '
    'echo "count $(env | wc -l)"; }} >> {out}'
)


def say(point: str, out: str) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", _SAY.format(out=out), "name", point, "b"],
            "env": ["A=value", "PATH=/usr/bin:/bin"]}  # fmt: skip


def facts(text: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "point":
            found.append({})
        found[-1][name] = value
    return found


def test_order_place_and_input(pymigrate: Local, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hooks = {point: [say(point, str(out))] * 2 for point in POINTS if point != "startContainer"}
    hooks["startContainer"] = [say("startContainer", "/hooks")] * 2
    bundle = make(tmp_path / "b", "while ! [ -e /go ]; do usleep 10000; done; cat /hooks", {"hooks": hooks,
                  "annotations": {"a.b": "c"}})  # fmt: skip
    (bundle / "rootfs/in-root").touch()
    pymigrate("create", "-b", bundle, "c")
    assert [fact["point"] for fact in facts(out.read_text())] == [p for p in POINTS[:3] for _ in range(2)]
    assert not (bundle / "rootfs/hooks").exists()
    pid = pymigrate.state("c")["pid"]
    spaces = {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("mnt", "net")}
    pymigrate("start", "c")
    assert [fact["point"] for fact in facts(out.read_text())][6:] == ["poststart"] * 2
    pymigrate("delete", "-f", "c")
    found = facts(out.read_text())
    assert [fact["point"] for fact in found] == [p for p in POINTS if p != "startContainer" for _ in range(2)]
    inner = facts((bundle / "rootfs/hooks").read_text())
    assert [fact["point"] for fact in inner] == ["startContainer"] * 2
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net")}
    for fact in found + inner:
        point = fact["point"]
        assert {name: fact[name] for name in ours} == (ours if point in OUTSIDE else spaces), point
        assert (fact["args"], fact["env"]) == (f"name {point} b", "value")
        assert int(fact["count"]) <= 5  # A, PATH, and what the shell adds itself: nothing of ours
        assert (fact["inroot"] == "yes") == (point == "startContainer")
        state = json.loads(fact["state"])
        status = {"startContainer": "created", "poststart": "running", "poststop": "stopped"}.get(point, "creating")
        assert (state["id"], state["status"], state["bundle"]) == ("c", status, str(bundle)), point
        assert state["annotations"] == {"a.b": "c"}
        if point != "poststop":
            assert state["pid"] == (pid if point in OUTSIDE else 1), point


def test_create_container_hooks_run_before_pivot_in_the_containers_mounts(pymigrate: Local, tmp_path: Path) -> None:
    """They may still mount something into the root file system, by the path that the host has for it."""
    bundle = make(tmp_path / "b", "cat /mnt/x; cat /proc/mounts | grep -c ' /mnt '")
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "rootfs/mnt").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").write_text("hooked\n")
    script = f"mount --bind {tmp_path}/data {bundle}/rootfs/mnt"
    config["hooks"] = {
        "createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}]
    }
    (bundle / "config.json").write_text(json.dumps(config))
    assert pymigrate("run", "-b", bundle, "c").stdout == "hooked\n1\n"
    assert "data" not in Path("/proc/self/mountinfo").read_text().split("/mnt")[-1]


def failing(point: str, tmp_path: Path, how: str) -> Fields:
    """Hooks of which the second of `point` fails; the others note that they ran."""

    def note(name: str, place: str) -> dict[str, Any]:
        return {"path": "/bin/sh", "args": ["sh", "-c", f"echo {name} >> {place}"]}

    bad: dict[str, dict[str, Any]] = {
        "status": {"path": "/bin/sh", "args": ["sh", "-c", "echo because >&2; exit 3"]},
        "timeout": {"path": "/bin/sleep", "args": ["sleep", "30.125"], "timeout": 1},
        "missing": {"path": "/no/such/hook"},
    }
    hooks = {name: [note(name, "/ran" if name == "startContainer" else f"{tmp_path}/ran")] for name in POINTS}
    hooks[point] = [
        hooks[point][0],
        bad[how],
        note(f"{point}-later", "/ran" if point == "startContainer" else f"{tmp_path}/ran"),
    ]
    return {"hooks": hooks}


WORDS = {
    "status": "exit status 3: because",
    "timeout": "did not exit within 1 s",
    "missing": "No such file or directory",
}


@pytest.mark.parametrize("how", WORDS)
@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer"])
def test_failing_before_the_container_is_created(pymigrate: Local, tmp_path: Path, point: str, how: str) -> None:
    before = leaks(pymigrate.root, str(tmp_path))
    said = refusal(pymigrate, tmp_path, failing(point, tmp_path, how))
    assert f"hooks.{point}[1] (" in said
    assert WORDS[how] in said
    # The specification: stop the container, destroy what was made, and run the poststop hooks.
    assert (tmp_path / "ran").read_text().split() == [*POINTS[: POINTS.index(point) + 1], "poststop"]
    assert [line for line in left(before, pymigrate.root, str(tmp_path)) if str(tmp_path) in line] == []
    assert b"30.125" not in b"".join(_commands())


def _commands() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


def test_failing_start_container_hook_ends_the_container(pymigrate: Local, tmp_path: Path) -> None:
    done = run(pymigrate, tmp_path, "echo ran", failing("startContainer", tmp_path, "status") | {})
    assert (done.returncode, done.stdout) == (1, "")
    assert "hooks.startContainer[1] (/bin/sh): exit status 3: because" in done.stderr
    assert (tmp_path / "ran").read_text().split()[-1] == "poststop"
    assert not (pymigrate.root / "c").exists()


def test_failing_poststart_hook_is_a_warning(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "sleep 60", failing("poststart", tmp_path, "status"))
    pymigrate("create", "-b", bundle, "c")
    done = pymigrate("start", "c")
    assert "warning: hooks.poststart[1] (/bin/sh): exit status 3: because" in done.stderr
    assert (tmp_path / "ran").read_text().split()[-2:] == ["poststart", "poststart-later"]
    assert json.loads(pymigrate("state", "c").stdout)["status"] == "running"


def test_failing_poststop_hook_is_a_warning(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "true", failing("poststop", tmp_path, "status"))
    pymigrate("create", "-b", bundle, "c")
    done = pymigrate("delete", "c")
    assert "warning: hooks.poststop[1] (/bin/sh): exit status 3: because" in done.stderr
    assert (tmp_path / "ran").read_text().split()[-2:] == ["poststop", "poststop-later"]
    assert not (pymigrate.root / "c").exists()


def test_poststop_hooks_run_when_the_bundle_is_gone(pymigrate: Local, tmp_path: Path) -> None:
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"pwd > {tmp_path}/ran"]}
    bundle = make(tmp_path / "b", "true", {"hooks": {"poststop": [hook]}})
    pymigrate("create", "-b", bundle, "c")
    bundle.rename(tmp_path / "elsewhere")
    pymigrate("delete", "-f", "c")
    assert (tmp_path / "ran").read_text() == "/\n"


def test_hook_without_environment_gets_none(pymigrate: Local, tmp_path: Path) -> None:
    hook = {"path": "/usr/bin/env", "args": ["env"]}
    script = f"/usr/bin/env > {tmp_path}/env"
    output(
        pymigrate,
        tmp_path,
        "true",
        {"hooks": {"createRuntime": [hook, {"path": "/bin/sh", "args": ["sh", "-c", script]}]}},
    )
    assert set((tmp_path / "env").read_text().split("\n")) - {"", "_=/usr/bin/env", "SHLVL=1", "OLDPWD="} == {
        f"PWD={tmp_path}/b0"}  # fmt: skip
