"""Nothing is run or loaded that another user could have written: at the target, and by CRIU at the source."""

import os
import stat
from pathlib import Path

import pytest

from criu_rpc import swrk
from migrate.source import tar_images
from tests.system.conftest import Lab

CONNECT = "from migrate.wire.peer import connect; connect('host2', root='/run/opencontainer/containers').close()"
NOBODY = 65534


def connect(lab: Lab) -> str:
    """What an attempt to start the agent at host2 fails of, "" when it starts."""
    return (lab.on("host1", lab.python, "-c", CONNECT, check=False).stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize("change", ["chown nobody /run/pymigrate", "chmod 777 /run/pymigrate", "link"])
def test_a_directory_for_the_agent_that_is_not_roots_alone(lab: Lab, change: str) -> None:
    lab.sh("host2", "mkdir -p /run/pymigrate; mv /run/pymigrate /run/saved; mkdir /run/pymigrate /run/target")
    if change == "link":
        change = "rmdir /run/pymigrate; ln -s /run/target /run/pymigrate"
    try:
        lab.sh("host2", change)
        said = connect(lab)
        assert "TargetError: host2: /run/pymigrate" in said
        assert lab.sh("host2", "ls -A /run/pymigrate/") == ""
    finally:
        lab.sh("host2", "rm -rf /run/pymigrate /run/target; mv /run/saved /run/pymigrate")


@pytest.mark.slow
def test_an_agent_that_another_user_could_change_is_sent_again(lab: Lab) -> None:
    lab.sh("host2", "rm -rf /run/pymigrate/agent-*")  # those that other tests have patched
    assert connect(lab) == ""
    (path,) = lab.sh("host2", "ls -d /run/pymigrate/agent-*").split()
    file = f"{path}/migrate/cli/__init__.py"
    changes = [f"chown nobody {path}", f"chmod 766 {path}", f"mv {path} /run/moved; ln -s /run/moved {path}"]
    changes += [f"chown nobody {file}", f"chmod 766 {file}", f"echo x >> {file}", f"rm {file}"]
    for change in changes:
        lab.sh("host2", change)
        assert connect(lab) == ""
        assert lab.sh("host2", f"stat -c '%u %a %F' {path}") == "0 700 directory\n", change
        assert lab.sh("host2", f"stat -c '%u %a %F' {file}") == "0 600 regular file\n", change
    lab.sh("host2", "rm -rf /run/moved")


def test_a_tar_that_another_user_has_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "tar"
    monkeypatch.setattr(tar_images, "DIRECTORY", directory)
    assert tar_images.environment()["PATH"].startswith(f"{directory}:")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    program = directory / "tar"
    for path, restore in ((program, 0), (directory, 0)):
        os.chown(path, NOBODY, NOBODY)
        assert str(directory) not in tar_images.environment()["PATH"]
        os.chown(path, restore, restore)
    program.write_text("#!/bin/sh\ntouch /tmp/x\n")
    assert str(directory) not in tar_images.environment()["PATH"]


def test_criu_is_not_looked_for_where_we_happen_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "criu").write_text("#!/bin/sh\n")
    (tmp_path / "criu").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYMIGRATE_CRIU", raising=False)
    monkeypatch.setattr(swrk, "_PLACES", ())
    for path in ("", ".", ":/usr/bin", "/nonexistent:"):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr(swrk, "_SEARCH", str(tmp_path / "nothing"))
        with pytest.raises(swrk.CriuNotFound):
            swrk.find()


def test_no_program_is_looked_for_where_we_happen_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from migrate.cli import main

    monkeypatch.setenv("PATH", ":/usr/bin:.:bin:/bin:")
    assert main(["--version"]) == 0
    assert os.environ["PATH"] == "/usr/bin:/bin"


def test_criu_reads_no_configuration_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME may be another user's after `su -m`; an action-script that is named there would run as root."""
    from criu_rpc.client import Criu

    (tmp_path / ".criu").mkdir()
    (tmp_path / ".criu" / "default.conf").write_text("no-such-option\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    os.chown(tmp_path, NOBODY, NOBODY)
    assert Criu().version() > (3,)
