"""Logging in to another host: OpenSSH's configuration and known_hosts, through paramiko.

Honoured of ~/.ssh/config and /etc/ssh/ssh_config, and of what they include: HostName, User, Port, IdentityFile,
IdentitiesOnly, ProxyJump, ProxyCommand, HostKeyAlias, UserKnownHostsFile, GlobalKnownHostsFile, ConnectTimeout. A host
key that is not in known_hosts, or differs from it, is refused; StrictHostKeyChecking cannot lift that.
"""

import base64
import contextlib
import getpass
import glob
import hashlib
import io
import re
import shlex
import socket
from pathlib import Path
from typing import Any, NoReturn

import paramiko

from migrate.errors import HostError, UsageError

CONNECT_TIMEOUT = 15.0
KEEPALIVE = 3  # seconds between keep-alives, so that a dead connection is noticed
DEAD_AFTER = 10  # seconds without acknowledgement after which a connection counts as lost
_DEFAULT_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_SETTING = re.compile(r"\s*(\w+)(?:\s*=\s*|\s+)(.+)")
_DEEPEST = 16  # files that include each other, as OpenSSH has it
_DEFAULT_GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"


def login(host: str) -> paramiko.SSHClient:
    """An authenticated session with `host` ([USER@]NAME, NAME may be a Host of ~/.ssh/config).

    Raises UsageError for a malformed name, HostError for everything that keeps us out.
    """
    user, _, name = host.rpartition("@")
    if not name or name.startswith("-") or any(c.isspace() or not c.isprintable() for c in host):
        raise UsageError(f"{host!r} is no host name")
    options = _options(name)
    address, port = options.get("hostname", name), _port(name, options)
    user = user or options.get("user") or getpass.getuser()
    timeout = float(options["connecttimeout"]) if options.get("connecttimeout", "").isdigit() else CONNECT_TIMEOUT
    # As ssh does it: an alias stands for host and port.
    key_name = options.get("hostkeyalias") or (address if port == 22 else f"[{address}]:{port}")
    client = paramiko.SSHClient()
    for path in _known_hosts_files(options):
        with contextlib.suppress(FileNotFoundError):
            client.load_system_host_keys(str(path))
    client.set_missing_host_key_policy(_Refuse(host))
    sock = _socket(host, user, address, port, options, timeout)
    try:
        client.connect(
            key_name,
            username=user,
            key_filename=options.get("identityfile"),
            look_for_keys=options.get("identitiesonly", "no") != "yes",
            allow_agent=options.get("identitiesonly", "no") != "yes",
            sock=sock,
            transport_factory=_transport,
            timeout=timeout,
            banner_timeout=timeout,
            auth_timeout=timeout,
        )
    except BaseException as error:
        client.close()
        sock.close()
        _explain(host, user, key_name, error)
    transport = client.get_transport()
    if transport is not None:
        transport.set_keepalive(KEEPALIVE)
        if isinstance(transport.sock, socket.socket):
            # A keep-alive that is not acknowledged ends the connection: a container may be frozen meanwhile.
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)
    return client


def _transport(sock: Any, **options: Any) -> paramiko.Transport:
    """A transport that prefers ciphers with authentication built in: they carry up to twice as much here."""
    transport = paramiko.Transport(sock, **options)
    security = transport.get_security_options()
    security.ciphers = sorted(security.ciphers, key=lambda name: "gcm" not in name)
    return transport


class _Refuse(paramiko.MissingHostKeyPolicy):
    """A host whose key is not known is refused, with the sentence that tells how to add it."""

    def __init__(self, host: str) -> None:
        self._host = host

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> NoReturn:
        raise HostError(
            f"{self._host}: its host key is not in known_hosts ({key.get_name()} {_fingerprint(key)})",
            remedy=f"compare it with the key at the host, then add it: `ssh {self._host} true`",
        )


def _fingerprint(key: paramiko.PKey) -> str:
    """The key's fingerprint as OpenSSH shows it: SHA256:..."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")


def _explain(host: str, user: str, key_name: str, error: BaseException) -> NoReturn:
    """Turn what paramiko raised into one sentence that names the cause."""
    match error:
        case HostError():
            raise error
        case paramiko.BadHostKeyException():
            raise HostError(
                f"{host}: its host key has changed: known_hosts has {_fingerprint(error.expected_key)}, "
                f"the host shows {_fingerprint(error.key)}; somebody may be in between",
                remedy=f"if the host was installed anew: `ssh-keygen -R '{key_name}'`, then `ssh {host} true`",
            ) from None
        case paramiko.AuthenticationException() | paramiko.PasswordRequiredException():
            raise HostError(
                f"{host}: it refuses to let {user} log in ({error})",
                remedy=f"`ssh {user}@{host.rpartition('@')[2]} true` must work without a password",
            ) from None
        case paramiko.SSHException() | OSError() | EOFError():
            raise HostError(
                f"{host}: the SSH session cannot be set up: {error or type(error).__name__}",
                remedy=f"does `ssh {host} true` work?",
            ) from None
        case _:
            raise error


def _options(name: str) -> dict[str, Any]:
    config = paramiko.SSHConfig()
    for path in (Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config")):
        try:
            _read(config, path, path.parent, name)
        except (OSError, UnicodeDecodeError, paramiko.SSHException) as error:
            raise HostError(f"{path}: cannot be read: {error}") from None
    return dict(config.lookup(name))


def _read(config: paramiko.SSHConfig, path: Path, base: Path, name: str, depth: int = 0) -> None:
    """Add a file's options, and in their place those of the files that it includes, which paramiko passes over.

    The first value of an option counts. An Include in a block of other hosts than `name` says nothing.
    """
    if depth > _DEEPEST:
        raise paramiko.SSHException(f"{path}: is included too deep")
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    header = "Host *"
    part: list[str] = []
    for line in lines:
        keyword, value = match.groups() if (match := _SETTING.match(line)) else ("", "")
        if keyword.lower() == "include":
            config.parse(io.StringIO("\n".join(part)))
            part = [header]
            if "include" in paramiko.SSHConfig.from_text(f"{header}\n{line}").lookup(name):
                for pattern in shlex.split(value):
                    for included in sorted(glob.glob(str(base / Path(pattern).expanduser()))):
                        _read(config, Path(included), base, name, depth + 1)
            continue
        header = line if keyword.lower() in ("host", "match") else header
        part.append(line)
    config.parse(io.StringIO("\n".join(part)))


def _port(name: str, options: dict[str, Any]) -> int:
    port = str(options.get("port", 22))
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise HostError(f"{name}: {port!r} is no port number", remedy="correct `Port` in ~/.ssh/config")
    return int(port)


def _known_hosts_files(options: dict[str, Any]) -> list[Path]:
    files = shlex.split(options.get("userknownhostsfile", _DEFAULT_KNOWN_HOSTS))
    files += shlex.split(options.get("globalknownhostsfile", _DEFAULT_GLOBAL_KNOWN_HOSTS))
    return [Path(file).expanduser() for file in files if file != "none"]


def _socket(host: str, user: str, address: str, port: int, options: dict[str, Any], timeout: float) -> Any:
    """A connected socket to the host, directly or through ProxyCommand or ProxyJump (which wants ssh)."""
    proxy = options.get("proxycommand", "none")
    jump = options.get("proxyjump", "none")
    if proxy == "none" and jump != "none":
        target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        first, _, rest = jump.rpartition(",")
        proxy = shlex.join(["ssh", "-W", target, *(["-J", first] if first else []), "--", rest])
    try:
        if proxy != "none":
            return paramiko.ProxyCommand(proxy)
        sock = socket.create_connection((address, port), timeout=timeout)
        # The log-in says several small things in a row: each would wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except socket.gaierror:
        raise HostError(f"{host}: the name {address} is unknown", remedy="is it spelled as in ~/.ssh/config?") from None
    except TimeoutError:
        raise HostError(f"{host}: no answer from {address} port {port} within {timeout:g} s") from None
    except OSError as error:
        raise HostError(
            f"{host}: cannot connect to {address} port {port}: {error.strerror or error}",
            remedy="is sshd running there, and is the port open?",
        ) from None
