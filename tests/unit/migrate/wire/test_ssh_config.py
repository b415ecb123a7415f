"""Options of ssh out of several files: OpenSSH itself says what they mean."""

import getpass
import subprocess
from pathlib import Path

import pytest

from migrate.errors import HostError
from migrate.wire import ssh

MAIN = """Include {0}/early {0}/missing
Port 2201
Host web*
  User carol
  Include {0}/of-web-*
  Port 2202
Host other
  Include {0}/of-other
Host *
  HostName 192.0.2.9
"""
FILES = {
    "early": "HostKeyAlias early\nHost web1\n  Port 2203\nInclude {0}/deep\n",
    "deep": "Host web1\n  HostName 192.0.2.1\n",
    "of-web-1": "Host web2\n  HostName 192.0.2.2\n",
    "of-web-2": "Host web3\n  User dave\n",
    "of-other": "Host *\n  HostName 192.0.2.3\nHost web4\n  HostName 192.0.2.4\n",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / ".ssh"
    directory.mkdir()
    for name, text in {"config": MAIN, **FILES}.items():
        (directory / name).write_text(text.format(directory))
    return directory / "config"


@pytest.mark.parametrize("name", ["web1", "web2", "web3", "web4", "other", "third"])
def test_what_is_included_holds_as_for_openssh(config: Path, name: str) -> None:
    said = subprocess.run(["ssh", "-F", config, "-G", name], capture_output=True, text=True, check=True).stdout
    wanted = dict(line.split(" ", 1) for line in said.splitlines())
    found = ssh._options(name)
    for option in ("hostname", "port", "hostkeyalias"):
        assert found[option] == wanted[option], option
    assert found.get("user", getpass.getuser()) == wanted["user"]


def test_a_path_is_one_beside_the_file(config: Path) -> None:
    config.write_text("Include early\n")
    assert ssh._options("web1")["port"] == "2203"


def test_files_that_include_each_other_are_refused(config: Path) -> None:
    config.write_text(f"Include {config}\n")
    with pytest.raises(HostError, match="included too deep"):
        ssh._options("web1")
