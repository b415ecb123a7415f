"""The options of a host: as ssh reports them, and as paramiko reads them where there is no ssh."""

import os
import pwd
import shutil
from pathlib import Path

import pytest

from migrate.errors import HostError
from migrate.wire import ssh, ssh_config

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
USER = pwd.getpwuid(os.getuid()).pw_name
HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)
WANTED = {
    "web1": ("192.0.2.1", 2203, "carol"),
    "web2": ("192.0.2.2", 2201, "carol"),
    "web3": ("192.0.2.9", 2201, "carol"),
    "web4": ("192.0.2.9", 2201, "carol"),
    "other": ("192.0.2.3", 2201, USER),
    "third": ("192.0.2.9", 2201, USER),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the `ssh` on PATH reads instead of ~/.ssh/config, which it would not look for by HOME."""
    path = tmp_path / "config"
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {path} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return path


@pytest.fixture
def without_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ~/.ssh/config of a host that has no ssh program."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ssh_config, "_home", lambda: str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path / ".ssh" / "config"


@pytest.mark.parametrize("name", WANTED)
def test_included_files_count(config: Path, tmp_path: Path, name: str) -> None:
    for file, text in {"config": MAIN, **FILES}.items():
        (tmp_path / file).write_text(text.format(tmp_path))
    found = ssh_config.look_up(name)
    assert (found.address, found.port, found.user) == WANTED[name]
    assert found.alias == found.key_name == "early"


def test_files_that_include_each_other_are_refused(config: Path) -> None:
    config.write_text(f"Include {config}\n")
    with pytest.raises(HostError, match=r"web1: ssh refuses its configuration: .*(recursion|deep|include)"):
        ssh_config.look_up("web1")


def test_defaults(config: Path) -> None:
    config.touch()
    found = ssh_config.look_up("Web1")
    assert (found.address, found.port, found.user, found.key_name) == ("web1", 22, USER, "web1")
    assert (found.timeout, found.identities_only, found.proxy) == (ssh_config.CONNECT_TIMEOUT, False, ())
    assert (found.alias, found.revoked) == ("", ())
    assert [str(path) for path in found.known_hosts] == [
        f"{HOME}/.ssh/known_hosts", f"{HOME}/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"
    ]  # fmt: skip
    assert all(path.parent == HOME / ".ssh" and path.exists() for path in found.identity_files)


def test_the_user_that_is_asked_for(config: Path) -> None:
    config.write_text("Match user carol\n  Port 2222\nHost *\n  User dave\n")
    found = ssh_config.look_up("web1", "carol")
    assert (found.user, found.port, found.key_name) == ("carol", 2222, "[web1]:2222")
    assert ssh_config.look_up("web1").user == "dave"


def test_identity_files(config: Path, tmp_path: Path) -> None:
    for name in ("web1-key", "a b", "never"):
        (tmp_path / name).touch()
    config.write_text(
        f"IdentityFile {tmp_path}/missing\nIdentityFile {tmp_path}/%n-key\n"
        f'IdentityFile "{tmp_path}/a b"\nIdentityFile {tmp_path}/web1-key\nIdentitiesOnly yes\n'
    )
    found = ssh_config.look_up("web1")
    assert found.identity_files == (tmp_path / "web1-key", tmp_path / "a b")
    assert found.identities_only
    config.write_text("IdentityFile none\n")
    assert ssh_config.look_up("web1").identity_files == ()


def test_files_of_keys(config: Path) -> None:
    config.write_text(
        'UserKnownHostsFile "/a b/c" ~/d %d/e\nGlobalKnownHostsFile none\n'
        "RevokedHostKeys ~/revoked\nConnectTimeout 2m\n"
    )
    found = ssh_config.look_up("web1")
    assert found.known_hosts == (Path("/a b/c"), HOME / "d", HOME / "e")
    assert found.revoked == (HOME / "revoked",)
    assert found.timeout == 120


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ProxyCommand nc -x '%r @%h' %%p %p\nHostName h", ("nc", "-x", "carol @h", "%p", "22")),
        ("ProxyJump j", ("ssh", "-W", "web1:22", "--", "ssh://j")),
        ("ProxyJump u@j1:24,u@j2:25\nPort 23", ("ssh", "-W", "web1:23", "-J", "u@j1:24", "--", "ssh://u@j2:25")),
        ("ProxyJump ssh://u@j2:25", ("ssh", "-W", "web1:22", "--", "ssh://u@j2:25")),
        ("ProxyJump j\nHostName ::1", ("ssh", "-W", "[::1]:22", "--", "ssh://j")),
        ("ProxyCommand none\nProxyJump j", ()),
    ],
)
def test_proxies(config: Path, text: str, wanted: tuple[str, ...]) -> None:
    config.write_text(f"{text}\n")
    assert ssh_config.look_up("web1", "carol").proxy == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Bogus 1", "Bad configuration option: bogus"),
        ("Port 99999", "Bad port"),
        ("IdentityFile %x", "the token %x is not supported"),
        ("IdentityFile ${NO_SUCH_VARIABLE}", "the token .*NO_SUCH_VARIABLE"),
        ("IdentityFile ~nobody-knows/x", "IdentityFile ~nobody-knows/x: "),
        ("ProxyCommand nc 'x", "No closing quotation|invalid quotes"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: Path, text: str, words: str) -> None:
    config.write_text(f"{text}\n")
    with pytest.raises(HostError, match=words):
        ssh_config.look_up("web1")


def test_an_endless_lookup(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_config, "SSH_CONFIG_TIMEOUT", 0.2)
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    with pytest.raises(HostError, match=r"within 0\.2 s"):
        ssh_config.look_up("web1")


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "root@-oProxyCommand=x", "a b", "", "root@"])
def test_a_name_is_never_an_option(config: Path, name: str) -> None:
    with pytest.raises(Exception, match="invalid host name") as caught:
        ssh.login(name)
    assert type(caught.value).__name__ == "UsageError"


def test_without_ssh(without_ssh: Path) -> None:
    without_ssh.write_text("Host web*\n  HostName 192.0.2.1\n  Port 2222\n  User carol\n  UserKnownHostsFile ~/k ~/l\n")
    (without_ssh.parent / "id_ed25519").touch()
    found = ssh_config.look_up("web1")
    assert (found.address, found.port, found.user, found.key_name) == ("192.0.2.1", 2222, "carol", "[192.0.2.1]:2222")
    home = without_ssh.parent.parent
    assert found.known_hosts[:2] == (home / "k", home / "l")
    assert found.identity_files == (home / ".ssh" / "id_ed25519",)
    assert ssh_config.look_up("other").known_hosts[:2] == (home / ".ssh/known_hosts", home / ".ssh/known_hosts2")


def test_without_ssh_an_include_is_refused(without_ssh: Path) -> None:
    without_ssh.write_text("Host web*\n  include other*\n")
    assert ssh_config.look_up("web1").port == 22
    (without_ssh.parent / "other1").touch()
    with pytest.raises(HostError, match="Include needs the program ssh"):
        ssh_config.look_up("web1")
