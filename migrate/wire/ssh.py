"""Logging in to another host: OpenSSH's configuration and known_hosts, through paramiko.

Honoured of ~/.ssh/config and /etc/ssh/ssh_config, and of what they include: HostName, User, Port, IdentityFile,
IdentitiesOnly, ProxyJump, ProxyCommand, HostKeyAlias, UserKnownHostsFile, GlobalKnownHostsFile, RevokedHostKeys,
ConnectTimeout. A host key that is revoked, is not in known_hosts, or differs from it is refused; StrictHostKeyChecking
cannot lift that.
"""

import base64
import functools
import getpass
import glob
import hashlib
import io
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import paramiko
from paramiko.common import MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA

from migrate.errors import HostError, UsageError
from migrate.wire import known_hosts
from migrate.wire.known_hosts import Key, Known

CONNECT_TIMEOUT = 15.0
KEEPALIVE = 3  # seconds between keep-alives, so that a dead connection is noticed
DEAD_AFTER = 10  # seconds without acknowledgement after which a connection counts as lost
WINDOW = 8 << 20  # bytes that a channel holds at most until somebody reads them
_LARGEST_PACKET = 256 << 10  # bytes; RFC 4253, 6.1 asks for 35,000
_LONGEST_GREETING = 64 << 10  # bytes before the first packet; RFC 4253, 4.2
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
    known = known_hosts.look(_known_hosts_files(options), key_name)
    if not known.keys and key_name != address and "hostkeyalias" not in options:
        plain = known_hosts.look(_known_hosts_files(options), address)  # whatever its port, as ssh has it
        known = Known(plain.keys, plain.revoked | known.revoked)
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(_Verify(host, key_name, known, _paths(options, "revokedhostkeys", "none")))
    sock = _socket(host, user, address, port, options, timeout)
    try:
        client.connect(
            key_name,
            username=user,
            key_filename=options.get("identityfile"),
            look_for_keys=options.get("identitiesonly", "no") != "yes",
            allow_agent=options.get("identitiesonly", "no") != "yes",
            sock=sock,
            transport_factory=functools.partial(_transport, known),
            timeout=timeout,
            banner_timeout=timeout,
            auth_timeout=timeout,
        )
    except BaseException as error:
        client.close()
        sock.close()
        _explain(host, user, error)
    transport = client.get_transport()
    if transport is not None:
        transport.set_keepalive(KEEPALIVE)
        if isinstance(transport.sock, socket.socket):
            # A keep-alive that is not acknowledged ends the connection: a container may be frozen meanwhile.
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)
    return client


def _transport(known: Known, sock: Any, **options: Any) -> paramiko.Transport:
    """A transport that asks for a host key of a known type.

    It prefers ciphers with authentication built in: they carry up to twice as much here.
    """
    transport = _Transport(sock, packetizer_class=_Packetizer, **options)
    security = transport.get_security_options()
    security.ciphers = sorted(security.ciphers, key=lambda name: "gcm" not in name)
    types = {key.type for key in known.keys}
    security.key_types = sorted(security.key_types, key=lambda name: _RSA.sub("ssh-rsa", name) not in types)
    return transport


class _Packetizer(paramiko.packet.Packetizer):
    """Believes no length of the other side: paramiko's own waits for as many bytes as a packet claims to have."""

    _greeting = 0

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if n > _LARGEST_PACKET:
            raise paramiko.SSHException(f"a packet of {n} bytes is over the limit of {_LARGEST_PACKET}")
        data: bytes = super().read_all(n, check_rekey)
        return data

    def _read_timeout(self, timeout: float) -> bytes:
        data: bytes = super()._read_timeout(timeout)  # type: ignore[misc]
        self._greeting += len(data)
        if self._greeting > _LONGEST_GREETING:
            raise paramiko.SSHException("the host greets without end")
        return data


def _within_window(take: Callable[[paramiko.Channel, paramiko.Message], None]) -> Any:
    """`take` a piece of a channel's data, but no more than a channel may hold that nobody has read."""

    def bounded(channel: paramiko.Channel, message: paramiko.Message) -> None:
        take(channel, message)
        if len(channel.in_buffer) + len(channel.in_stderr_buffer) > WINDOW + _LARGEST_PACKET:
            raise paramiko.SSHException("the host sends more than it may")

    return bounded


class _Transport(paramiko.Transport):
    """Ends when a host sends more than the window of a channel, which paramiko itself would store."""

    _channel_handler_table = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_DATA: _within_window(paramiko.Channel._feed),  # type: ignore[attr-defined]
        MSG_CHANNEL_EXTENDED_DATA: _within_window(paramiko.Channel._feed_extended),  # type: ignore[attr-defined]
    }


class _Verify(paramiko.MissingHostKeyPolicy):
    """Compares the key that a host shows with known_hosts (paramiko itself is told of none), and refuses any other."""

    def __init__(self, host: str, key_name: str, known: Known, revoked: list[Path]) -> None:
        self._host, self._key_name, self._known, self._revoked = host, key_name, known, revoked

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        shown = Key(key.get_name(), key.asbytes())
        what = f"{shown.type} {_fingerprint(shown.blob)}"
        if shown.blob in self._known.revoked or any(known_hosts.is_revoked(path, shown) for path in self._revoked):
            raise HostError(
                f"{self._host}: its host key is marked as revoked ({what}); somebody may be in between",
                remedy="give the host a new key; if this one was revoked by mistake, remove the line with @revoked "
                f"for '{self._key_name}' from known_hosts",
            )
        if shown in self._known.keys:
            return
        same = [known for known in self._known.keys if known.type == shown.type]
        if same:
            raise HostError(
                f"{self._host}: its host key has changed: known_hosts has {_fingerprint(same[0].blob)}, "
                f"the host shows {_fingerprint(shown.blob)}; somebody may be in between",
                remedy=f"if the host was installed anew: `ssh-keygen -R '{self._key_name}'`, "
                f"then `ssh {self._host} true`",
            )
        raise HostError(
            f"{self._host}: its host key is not in known_hosts ({what})",
            remedy=f"compare it with the key at the host, then add it: `ssh {self._host} true`",
        )


_RSA = re.compile(r"rsa-sha2-(256|512)")


def _fingerprint(blob: bytes) -> str:
    """A key's fingerprint as OpenSSH shows it: SHA256:..."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _explain(host: str, user: str, error: BaseException) -> NoReturn:
    """Turn what paramiko raised into one sentence that names the cause."""
    match error:
        case HostError():
            raise error
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
        except (OSError, ValueError, RuntimeError, paramiko.SSHException) as error:
            raise HostError(f"{path}: cannot be read: {error}") from None
    try:
        return dict(config.lookup(name))
    except (OSError, ValueError, ImportError, paramiko.SSHException) as error:
        raise HostError(f"~/.ssh/config: cannot be understood for {name}: {error}") from None


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
    files = _paths(options, "userknownhostsfile", _DEFAULT_KNOWN_HOSTS)
    return files + _paths(options, "globalknownhostsfile", _DEFAULT_GLOBAL_KNOWN_HOSTS)


def _paths(options: dict[str, Any], option: str, default: str) -> list[Path]:
    """The files that an option names. Raises HostError for a value that cannot be understood."""
    value = options.get(option, default)
    if "%" in value or "${" in value:
        raise HostError(f"~/.ssh/config: {option} {value}: tokens are not known here", remedy="write the path in full")
    try:
        return [Path(file).expanduser() for file in shlex.split(value) if file != "none"]
    except (ValueError, RuntimeError) as error:  # a quote that does not end; a home directory that is unknown
        raise HostError(f"~/.ssh/config: {option} {value}: {error}") from None


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
