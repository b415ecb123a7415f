"""How to reach a host: the options that `ssh -G` reports for it.

ssh itself resolves Host, Match, Include, canonical names and defaults. Asking it takes 5 ms; paramiko's parser takes
0.2 ms, but ignores Include and supports only a part of Match. Only on a host without ssh does paramiko read
~/.ssh/config and /etc/ssh/ssh_config. A file that they include is refused there.

Honoured: HostName, User, Port, IdentityFile, IdentitiesOnly, ProxyJump, ProxyCommand, HostKeyAlias, UserKnownHostsFile,
GlobalKnownHostsFile, RevokedHostKeys, ConnectTimeout. `ssh -G` reports IdentityFile, RevokedHostKeys and ProxyCommand
as they are written, so that their tokens (ssh_config(5)) are expanded here.
"""

import glob
import os
import pwd
import re
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from migrate.errors import HostError
from migrate.limits import CONNECT_TIMEOUT, SSH_CONFIG_TIMEOUT

_LARGEST = 1 << 20  # bytes of what `ssh -G` prints, which are about 4 KiB
_DEFAULTS = {
    "userknownhostsfile": ["~/.ssh/known_hosts ~/.ssh/known_hosts2"],
    "globalknownhostsfile": ["/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"],
    "identityfile": ["~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519"],
}
_INCLUDE = re.compile(r"^\s*include(?:\s*=\s*|\s+)(.*)", re.IGNORECASE | re.MULTILINE)
_TOKEN = re.compile(r"%(.?)|\$\{(\w*)\}?")

_Options = dict[str, list[str]]  # by keyword, in lower case


@dataclass(frozen=True)
class HostConfig:
    """How to reach and authenticate one host."""

    address: str
    port: int
    user: str
    timeout: float  # seconds to connect, and to each answer until the log-in
    identity_files: tuple[Path, ...]  # private keys that exist, in the order in which they are offered
    identities_only: bool
    proxy: tuple[str, ...]  # the command whose stdin and stdout are the connection; empty for a direct one
    alias: str  # HostKeyAlias, or ""
    known_hosts: tuple[Path, ...]
    revoked: tuple[Path, ...]

    @property
    def key_name(self) -> str:
        """The name of the host in known_hosts. An alias replaces address and port, as in ssh."""
        return self.alias or (self.address if self.port == 22 else f"[{self.address}]:{self.port}")


def look_up(name: str, user: str = "") -> HostConfig:
    """Return how to reach the host `name` of the ssh configuration, as `user` if that is given.

    Raises HostError for a configuration that ssh refuses, or a value that cannot be honoured.
    """
    options = _by_ssh(name, user)
    if options is None:
        options = _by_paramiko(name)
    address = _first(options, "hostname", name)
    port = _port(name, _first(options, "port", "22"))
    user = user or _first(options, "user") or pwd.getpwuid(os.getuid()).pw_name
    alias = _first(options, "hostkeyalias")
    timeout = _first(options, "connecttimeout")
    tokens = {"%": "%", "d": _home(), "h": address, "i": str(os.getuid()), "k": alias or name, "n": name,
              "p": str(port), "r": user, "u": pwd.getpwuid(os.getuid()).pw_name, "l": socket.gethostname(),
              "L": socket.gethostname().partition(".")[0]}  # fmt: skip
    identities = [_path("IdentityFile", value, tokens) for value in options.get("identityfile", []) if value != "none"]
    return HostConfig(
        address, port, user,
        float(timeout) if timeout.isdigit() and int(timeout) else CONNECT_TIMEOUT,
        tuple(path for path in dict.fromkeys(identities) if path.exists()),  # ssh passes over those that do not exist
        _first(options, "identitiesonly") == "yes",
        _proxy(address, port, options, tokens),
        alias,
        tuple(_files("UserKnownHostsFile", options)) + tuple(_files("GlobalKnownHostsFile", options)),
        tuple(_path("RevokedHostKeys", value, {}) for value in options.get("revokedhostkeys", []) if value != "none"),
    )  # fmt: skip


def _by_ssh(name: str, user: str) -> _Options | None:
    """Return the options that ssh uses for a host; None without an ssh program. Raises HostError."""
    argv = ["ssh", "-T", "-G", *(["-l", user] if user else []), "--", name]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=SSH_CONFIG_TIMEOUT)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise HostError(
            f"{name}: `ssh -G` has not read the ssh configuration within {SSH_CONFIG_TIMEOUT:g} s",
            remedy="look at Match exec and CanonicalizeHostname in ~/.ssh/config",
        ) from None
    except OSError as error:
        raise HostError(f"{name}: cannot run ssh to read its configuration: {error.strerror}") from None
    if done.returncode or len(done.stdout) > _LARGEST:
        said = done.stderr.decode(errors="replace").strip()[:500].splitlines() or ["its answer is too long"]
        raise HostError(f"{name}: ssh refuses its configuration: {said[0]}", remedy=f"does `ssh -G {name}` work?")
    options: _Options = {}
    for line in done.stdout.decode(errors="surrogateescape").splitlines():
        keyword, _, value = line.partition(" ")
        options.setdefault(keyword.lower(), []).append(value)
    return options


def _by_paramiko(name: str) -> _Options:
    """The same without ssh. Raises HostError for files that cannot be read, or that include other files."""
    config = paramiko.SSHConfig()
    for path in (Path(_home(), ".ssh/config"), Path("/etc/ssh/ssh_config")):
        try:
            text = path.read_text()
            patterns = [os.path.expanduser(word) for words in _INCLUDE.findall(text) for word in words.split()]
            if any(glob.glob(str(path.parent / pattern)) for pattern in patterns):
                raise HostError(f"{path}: Include needs the program ssh", remedy="install ssh (openssh-client)")
            config.parse(text.splitlines())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, paramiko.SSHException) as error:
            raise HostError(f"{path}: cannot be read: {error}") from None
    try:
        found: dict[str, Any] = dict(config.lookup(name))
    except (OSError, ValueError, ImportError, paramiko.SSHException) as error:
        raise HostError(f"~/.ssh/config: cannot be understood for {name}: {error}") from None
    return _DEFAULTS | {key: value if isinstance(value, list) else [value] for key, value in found.items() if value}


def _first(options: _Options, keyword: str, default: str = "") -> str:
    return options.get(keyword, [default])[0]


def _port(name: str, port: str) -> int:
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise HostError(f"{name}: invalid port number {port!r}", remedy="correct `Port` in ~/.ssh/config")
    return int(port)


def _files(option: str, options: _Options) -> list[Path]:
    """The files of an option that names several. ssh separates absolute names by a space and does not quote them."""
    return [
        _path(option, file.strip('"'), {})
        for value in options.get(option.lower(), [])
        for file in re.split(r"\s+(?=[\"/~])", value)
        if file not in ("", "none")
    ]


def _path(option: str, value: str, tokens: dict[str, str]) -> Path:
    """Raises HostError for a value that cannot be expanded."""
    text = _expand(option, value, tokens)
    if text == "~" or text.startswith("~/"):
        return Path(_home() + text[1:])
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # an unknown user
        raise HostError(f"~/.ssh/config: {option} {value}: {error}") from None


def _expand(option: str, value: str, tokens: dict[str, str]) -> str:
    def replace(found: re.Match[str]) -> str:
        token, variable = found.groups()
        replacement = os.environ.get(variable) if variable else tokens.get(token)
        if replacement is None:
            raise HostError(
                f"~/.ssh/config: {option} {value}: the token {found[0]} is not supported", remedy="write it in full"
            )
        return replacement

    return _TOKEN.sub(replace, value)


def _home() -> str:
    """The home directory as ssh finds it: not by HOME."""
    return pwd.getpwuid(os.getuid()).pw_dir


def _proxy(address: str, port: int, options: _Options, tokens: dict[str, str]) -> tuple[str, ...]:
    """The command that connects to the host, of ProxyCommand or ProxyJump (which needs ssh)."""
    command, jump = _first(options, "proxycommand", "none"), _first(options, "proxyjump", "none")
    if command != "none":
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise HostError(f"~/.ssh/config: ProxyCommand {command}: {error}") from None
        return tuple(re.sub("^~(?=/)", _home(), _expand("ProxyCommand", word, tokens)) for word in words)
    if jump == "none":
        return ()
    target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    hops, _, last = jump.rpartition(",")
    # As a URI, because the last hop may name its port.
    return "ssh", "-W", target, *(["-J", hops] if hops else []), "--", f"ssh://{last.removeprefix('ssh://')}"
