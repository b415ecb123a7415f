"""A bundle of config.json and runtime.json runs as one of a single file does."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.spec.default import default_spec
from runtime.spec.two_file_split import split
from tests.support.hosts import ROOTFS
from tests.system.conftest import Local

SCRIPT = """
hostname; id -u; ulimit -n; cat /proc/self/oom_score_adj; ls -l /dev/fuse; cat /data/file
grep -E '^Cap(Inh|Bnd|Prm)' /proc/self/status
touch /x 2>/dev/null || echo read-only
grep -o '^sysfs /sys sysfs r[ow]' /proc/mounts
"""


def write(bundle: Path, config: dict[str, Any], runtime: dict[str, Any]) -> None:
    (bundle / "config.json").write_text(json.dumps(config))
    (bundle / "runtime.json").write_text(json.dumps(runtime))


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copytree(ROOTFS, bundle / "rootfs", symlinks=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("from the host\n")
    config, runtime = split(default_spec())
    config["process"]["args"] = ["sh", "-c", SCRIPT]
    config["hostname"] = "of-two-files"
    config["mounts"].append({"name": "data", "path": "/data"})
    runtime["mounts"]["data"] = {"type": "bind", "source": str(tmp_path / "data"), "options": ["rbind", "ro"]}
    runtime["mounts"]["sys"]["options"] = ["nosuid"]
    runtime["linux"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": 77, "soft": 77}]
    runtime["linux"]["devices"] = [
        {"path": "/dev/fuse", "type": ord("c"), "major": 10, "minor": 229, "permissions": "rwm", "fileMode": 0o640}
    ]
    runtime["linux"]["resources"] |= {"oomScoreAdj": 500, "memory": {"limit": 64 << 20}, "pids": {"limit": 50}}
    return bundle, config, runtime


def test_it_runs(pymigrate: Local, two_files: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    bundle, config, runtime = two_files
    os.makedirs(bundle / "rootfs" / "data")
    write(bundle, config, runtime)
    hostname, uid, nofile, score, fuse, data, *rest = pymigrate("run", "-b", bundle, "old").stdout.splitlines()
    assert (hostname, uid, nofile, score, data) == ("of-two-files", "0", "77", "500", "from the host")
    assert fuse.startswith("crw-r-----")
    assert "10, 229" in fuse
    # CAP_KILL 5, CAP_NET_BIND_SERVICE 10, CAP_AUDIT_WRITE 29
    assert rest == [f"Cap{name}:\t0000000020000420" for name in ("Inh", "Prm", "Bnd")] + [
        "read-only",
        "sysfs /sys sysfs ro",
    ]


def test_a_snapshot_of_it(
    pymigrate: Local, two_files: tuple[Path, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    bundle, config, runtime = two_files
    del runtime["linux"]["devices"], runtime["mounts"]["data"], config["mounts"][-1]
    config["process"]["args"] = ["sleep", "1000"]
    write(bundle, config, runtime)
    pymigrate("run", "-d", "-b", bundle, "old")
    pymigrate("snapshot", "save", "--stop", "old", tmp_path / "snapshot")
    pymigrate("snapshot", "restore", tmp_path / "snapshot", "--id", "new")
    assert pymigrate("exec", "new", "hostname").stdout == "of-two-files\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 4}]}, "runtime.json: linux.rlimits[0].soft: is 5"),
        ({"annotations": {"a": "b"}}, "runtime.json: linux.annotations: is unknown"),
    ],
)
def test_a_complaint_names_the_file_it_lies_in(
    pymigrate: Local, two_files: tuple[Path, dict[str, Any], dict[str, Any]], change: dict[str, Any], words: str
) -> None:
    bundle, config, runtime = two_files
    runtime["linux"] |= change
    write(bundle, config, runtime)
    done = pymigrate("run", "-b", bundle, "old", check=False)
    assert (done.returncode, done.stdout) == (6, "")
    assert words in done.stderr
