"""root and mounts: what is mounted, with which options, and how it is tied to the host."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.boxes import Fields, make, output, refusal, run
from tests.support.hosts import ABLE
from tests.system.conftest import Local


def bind(source: Path | str, destination: str, *options: str, **more: object) -> Fields:
    return {"destination": destination, "source": str(source), "type": "bind", "options": ["rbind", *options], **more}


def mounted(text: str, place: str) -> list[tuple[str, str, str]]:
    """Of mountinfo: options, optional fields and file system options of what is mounted at a place, and below."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        dash = fields.index("-")
        if fields[4] == place or fields[4].startswith(place + "/"):
            found.append((fields[5], " ".join(fields[6:dash]), fields[dash + 3]))
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A shared mount, a directory in it with a mount of its own below it."""
    base = tmp_path / "tree"
    base.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tree", base], check=True)
    subprocess.run(["mount", "--make-private", base], check=True)
    subprocess.run(["mount", "--make-shared", base], check=True)
    (base / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "sub", base / "sub"], check=True)
    for place in (base, base / "sub"):
        (place / "file").write_text("x")
        (place / "link").symlink_to("file")
    yield base
    subprocess.run(["umount", "-R", base], check=True)


INFO = "cat /proc/self/mountinfo"


@pytest.mark.parametrize("readonly", [True, False])
def test_root(pymigrate: Local, tmp_path: Path, readonly: bool) -> None:
    done = run(pymigrate, tmp_path, "touch /x && echo made", {"root.readonly": readonly})
    assert (done.stdout, "Read-only" in done.stderr) == (("", True) if readonly else ("made\n", False))


@pytest.mark.parametrize(
    ("option", "above", "below"),
    [
        ("rro", "ro", "ro"), ("ro", "ro", "rw"), ("rnosuid", "nosuid", "nosuid"), ("nodev", "nodev", ""),
        ("rnodev", "nodev", "nodev"), ("rnoexec", "noexec", "noexec"), ("rnoatime", "noatime", "noatime"),
        ("rnodiratime", "nodiratime", "nodiratime"), ("rnosymfollow", "nosymfollow", "nosymfollow"),
        ("nosymfollow", "nosymfollow", ""), ("noatime", "noatime", "relatime"), ("rrelatime", "relatime", "relatime"),
    ],
)  # fmt: skip
def test_options_of_one_mount_and_of_the_tree(
    pymigrate: Local, tmp_path: Path, tree: Path, option: str, above: str, below: str
) -> None:
    said = output(pymigrate, tmp_path, INFO, {"mounts+": [bind(tree, "/mnt", option)]})
    (outer, _, _), (inner, _, _) = mounted(said, "/mnt")
    assert above in outer.split(",")
    assert below in inner.split(",") if below else option not in inner.split(",")


def test_recursive_options_undone(pymigrate: Local, tmp_path: Path, tree: Path) -> None:
    said = output(pymigrate, tmp_path, INFO, {
        "mounts+": [bind(tree, "/a", "rro"), bind(tree, "/b", "rro", "rrw"), bind(tree, "/c", "rstrictatime")],
    })  # fmt: skip
    assert [options.split(",")[0] for place in ("/a", "/b") for options, _, _ in mounted(said, place)] == [
        "ro", "ro", "rw", "rw",
    ]  # fmt: skip
    assert all("atime" not in options for options, _, _ in mounted(said, "/c"))


def test_read_only_holds(pymigrate: Local, tmp_path: Path, tree: Path) -> None:
    script = "touch /mnt/new; touch /mnt/sub/new; cat /mnt/link; cat /mnt/sub/link"
    done = run(pymigrate, tmp_path, script, {"mounts+": [bind(tree, "/mnt", "rro", "rnosymfollow")]})
    assert done.stderr.count("Read-only file system") == 2
    assert done.stderr.count("Too many levels of symbolic links") == 2
    assert (list(tree.glob("new")), list(tree.glob("sub/new"))) == ([], [])


@pytest.mark.parametrize(
    ("option", "root", "tie"),
    [
        ("rslave", None, "master:"),
        ("slave", None, "master:"),
        ("rshared", "rshared", "shared:"),
        ("rslave", "rslave", "master:"),
        ("rprivate", None, ""),
        (None, None, ""),
        ("runbindable", None, "unbindable"),
    ],
)
def test_propagation(
    pymigrate: Local, tmp_path: Path, tree: Path, option: str | None, root: str | None, tie: str
) -> None:
    options = [option] if option else []
    said = output(pymigrate, tmp_path, INFO, {
        "mounts+": [bind(tree, "/mnt", *options)], "linux.rootfsPropagation": root})  # fmt: skip
    (_, outer, _), (_, inner, _) = mounted(said, "/mnt")
    assert outer.startswith(tie)
    assert bool(outer) == bool(tie)
    assert inner.startswith("" if option == "slave" else tie)


def test_mounts_go_where_the_bundle_ties_them(pymigrate: Local, tmp_path: Path, tree: Path) -> None:
    """What is mounted in a shared mount is seen outside, what is mounted outside is seen in a slave."""
    fields: Fields = {"mounts+": [bind(tree, "/mnt", "rshared")], "linux.rootfsPropagation": "rshared"}
    fields["process.capabilities"] = ABLE
    before = Path("/proc/self/mountinfo").read_text()
    output(pymigrate, tmp_path, "mkdir /mnt/in; mount -t tmpfs made-inside /mnt/in", fields)
    after = Path("/proc/self/mountinfo").read_text()
    added = set(after.splitlines()) - set(before.splitlines())
    assert [line.split()[4] for line in added] == [str(tree / "in")]
    subprocess.run(["umount", tree / "in"], check=True)
    bundle = make(tmp_path / "slave", "sleep 60", {"mounts+": [bind(tree, "/mnt", "rslave")]})
    pymigrate("run", "-d", "-b", bundle, "d")
    (tree / "out").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "made-outside", tree / "out"], check=True)
    assert "made-outside" in pymigrate("exec", "d", "cat", "/proc/self/mountinfo").stdout


@pytest.mark.parametrize("propagation", ["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable"])
def test_root_propagation(pymigrate: Local, tmp_path: Path, propagation: str) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    said = output(pymigrate, tmp_path, INFO, {"linux.rootfsPropagation": propagation})
    (_, tie, _) = next(iter(mounted(said, "/")))
    assert tie.startswith({"s": "shared:" if "shared" in propagation else "", "u": "unbindable"}.get(
        propagation.removeprefix("r")[0], ""))  # fmt: skip
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.parametrize("flag", [(), ("--no-pivot",)])
def test_nothing_of_the_host_stays_mounted(pymigrate: Local, tmp_path: Path, flag: tuple[str, ...]) -> None:
    said = output(pymigrate, tmp_path, f"{INFO}; ls /; cat /proc/1/mounts", None, *flag)
    assert "work" not in said
    if not flag:
        assert str(tmp_path) not in said.replace(str(tmp_path / "b0/rootfs"), "")
        assert len(mounted(said.split("bin\n")[0], "")) < 60


def test_copy_up(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "cd /data; find . -maxdepth 1 | sort; find . -mindepth 2; cat file; readlink link; "
                  "stat -c '%n %a %u:%g' *; "
                  "rm pipe; cat inner/deep; touch ro 2>&1")  # fmt: skip
    data = bundle / "rootfs/data"
    (data / "inner").mkdir(parents=True)
    (data / "file").write_text("text\n")
    (data / "inner/deep").write_text("deep\n")
    (data / "link").symlink_to("/etc/passwd")
    os.mkfifo(data / "pipe")
    os.chown(data / "file", 12, 34)
    (data / "file").chmod(0o4755)
    os.chown(data / "inner", 5, 6)
    (data / "inner").chmod(0o1775)
    config = (bundle / "config.json").read_text()
    mount = '{"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=755"]}, '
    (bundle / "config.json").write_text(config.replace('"mounts": [', f'"mounts": [{mount}'))
    said = pymigrate("run", "-b", bundle, "c").stdout
    assert said.splitlines() == [
        ".", "./file", "./inner", "./link", "./pipe", "./inner/deep", "text", "/etc/passwd", "file 4755 12:34",
        "inner 1775 5:6", "link 777 0:0", "pipe 644 0:0", "deep",
    ]  # fmt: skip
    assert (data / "pipe").exists()
    (bundle / "config.json").write_text(
        config.replace('"mounts": [', f'"mounts": [{mount}'.replace("tmpcopyup", "ro\", \"tmpcopyup")))  # fmt: skip
    assert "touch: ro: Read-only file system" in pymigrate("run", "-b", bundle, "c", check=False).stdout


def test_files_directories_and_nested_places(pymigrate: Local, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("file\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_text("in d\n")
    mounts = [
        bind(tmp_path / "d", "/new/deep/dir"), bind(tmp_path / "f", "/new/deep/dir/x"),
        bind(tmp_path / "f", "/other/new/file"), bind(tmp_path / "f", "/etc/passwd"),
        {"destination": "new/deep/dir2", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=711"]},
    ]  # fmt: skip
    said = output(pymigrate, tmp_path, "cat /new/deep/dir/x /other/new/file /etc/passwd; stat -c %a /new/deep/dir2",
                  {"mounts+": mounts})  # fmt: skip
    assert said.splitlines() == ["file", "file", "file", "711"]
    assert (tmp_path / "d/x").read_text() == "in d\n"


def test_a_relative_source_is_the_bundles(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "cat /mnt/x", {"mounts+": [bind("volume", "/mnt")]})
    (bundle / "volume").mkdir()
    (bundle / "volume/x").write_text("mine\n")
    assert pymigrate("run", "-b", bundle, "c", cwd="/").stdout == "mine\n"


def test_missing_source_and_bad_option_are_named(pymigrate: Local, tmp_path: Path) -> None:
    assert "(/mnt): " in refusal(pymigrate, tmp_path, {"mounts+": [bind(tmp_path / "none", "/mnt")]})
    strange = {"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["no-such-option"]}
    assert "(/mnt): " in refusal(pymigrate, tmp_path, {"mounts+": [strange]})
    strange = {"destination": "/mnt", "type": "nosuchfs", "source": "x"}
    assert "(/mnt): mount nosuchfs on" in refusal(pymigrate, tmp_path, {"mounts+": [strange]})
    assert "options" in refusal(pymigrate, tmp_path, {"mounts+": [bind(tmp_path, "/mnt", "no-such-option")]})


def test_file_systems_and_their_options(pymigrate: Local, tmp_path: Path) -> None:
    said = output(pymigrate, tmp_path, INFO)
    assert "mode=620" in mounted(said, "/dev/pts")[0][2]
    assert {"ptmxmode=666", "gid=5"} <= set(mounted(said, "/dev/pts")[0][2].split(","))
    assert {"nosuid", "nodev", "noexec"} <= set(mounted(said, "/dev/mqueue")[0][0].split(","))
    assert mounted(said, "/sys")[0][0].split(",")[0] == "ro"
    assert "size=65536k" in mounted(said, "/dev/shm")[0][2]


def test_masked_and_read_only_paths(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "ls -A /secret; cat /file; touch /kept/x; echo x > /one; cat /kept/y; "
                  "echo x > /secret/x",
                  {"linux.maskedPaths": ["/secret", "/file", "/missing"],
                   "linux.readonlyPaths": ["/kept", "/one", "/missing"]})  # fmt: skip
    for name in ("secret", "kept"):
        (bundle / "rootfs" / name).mkdir()
        (bundle / "rootfs" / name / "y").write_text(f"{name}\n")
    for name in ("file", "one"):
        (bundle / "rootfs" / name).write_text("seen\n")
    done = pymigrate("run", "-b", bundle, "c", check=False)
    assert (done.stdout, done.stderr.count("Read-only file system")) == ("kept\n", 3)


@pytest.mark.parametrize("private", [True, False])
def test_cgroups(pymigrate: Local, tmp_path: Path, private: bool) -> None:
    kinds = ["pid", "network", "ipc", "uts", "mount", *(["cgroup"] if private else [])]
    said = output(pymigrate, tmp_path, "grep pids /proc/self/cgroup; wc -l < /sys/fs/cgroup/pids/cgroup.procs; "
                  "ls -d /sys/fs/cgroup/*;"
                  f" touch /sys/fs/cgroup/pids/x 2>&1; {INFO}",
                  {"linux.namespaces": [{"type": kind} for kind in kinds]})  # fmt: skip
    if not Path("/sys/fs/cgroup/pids").is_dir():
        pytest.skip("cgroup version 2")
    mine, processes, *lines = said.splitlines()
    own = mine.split(":")[2]
    assert own == "/" if private else "/pymigrate/test-" in own
    assert int(processes) == 2  # the shell and wc: the container's own, and no more
    assert "touch: /sys/fs/cgroup/pids/x: Read-only file system" in lines
    shown = mounted("\n".join(line for line in lines if " - " in line), "/sys/fs/cgroup")
    assert {options.split(",")[0] for options, _, _ in shown} == {"ro"}
    assert len(shown) == len([line for line in lines if line.startswith("/sys/fs/cgroup/")]) + 1
