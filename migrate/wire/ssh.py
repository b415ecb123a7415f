"""Log in to another host with paramiko, as OpenSSH's configuration (wire/ssh_config.py) and known_hosts say.

A host key that is revoked, is not in known_hosts, or differs from it is refused, whatever StrictHostKeyChecking
says.
"""

import base64
import functools
import hashlib
import re
import shlex
import socket
from collections.abc import Callable
from typing import Any, NoReturn

import paramiko
from paramiko.common import MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA

from migrate.errors import HostError, UsageError
from migrate.wire import known_hosts, ssh_config
from migrate.wire.known_hosts import Key, Known
from migrate.wire.packetizer import LARGEST_PACKET, Packetizer
from migrate.wire.ssh_config import HostConfig

KEEPALIVE = 3  # seconds between keep-alives, which detect a dead connection
DEAD_AFTER = 10  # seconds without acknowledgement after which a connection counts as lost
WINDOW = 8 << 20  # bytes that a channel buffers at most until they are read


def login(host: str) -> paramiko.SSHClient:
    """Return an authenticated session with `host` ([USER@]NAME, NAME may be a Host of ~/.ssh/config).

    Raises UsageError for a malformed name, HostError if the log-in fails.
    """
    user, _, name = host.rpartition("@")
    if not name or name.startswith("-") or any(c.isspace() or not c.isprintable() for c in host):
        raise UsageError(f"invalid host name {host!r}")
    config = ssh_config.look_up(name, user)
    known = known_hosts.look(config.known_hosts, config.key_name)
    if not known.keys and config.key_name != config.address and not config.alias:
        plain = known_hosts.look(config.known_hosts, config.address)  # whatever its port, as in ssh
        known = Known(plain.keys, plain.revoked | known.revoked)
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(_Verify(host, config, known))
    sock = _socket(host, config)
    try:
        client.connect(
            config.key_name,
            username=config.user,
            key_filename=[str(path) for path in config.identity_files],  # type: ignore[arg-type]
            look_for_keys=False,  # identity_files has the default ones
            allow_agent=not config.identities_only,
            sock=sock,
            transport_factory=functools.partial(_transport, known),
            timeout=config.timeout,
            banner_timeout=config.timeout,
            auth_timeout=config.timeout,
        )
    except BaseException as error:
        client.close()
        sock.close()
        _explain(host, config.user, error)
    transport = client.get_transport()
    if transport is not None:
        transport.set_keepalive(KEEPALIVE)
        if isinstance(transport.sock, socket.socket):
            # An unacknowledged keep-alive ends the connection, because a container may be frozen meanwhile.
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER * 1000)
    return client


def _transport(known: Known, sock: Any, **options: Any) -> paramiko.Transport:
    """Return a transport that asks for a host key of a known type.

    It prefers ciphers with built-in authentication, because their throughput is up to twice as high here.
    """
    transport = _Transport(sock, packetizer_class=Packetizer, **options)
    security = transport.get_security_options()
    security.ciphers = sorted(security.ciphers, key=lambda name: "gcm" not in name)
    types = {key.type for key in known.keys}
    security.key_types = sorted(security.key_types, key=lambda name: _RSA.sub("ssh-rsa", name) not in types)
    return transport


def _within_window(take: Callable[[paramiko.Channel, paramiko.Message], None]) -> Any:
    """Wrap `take`, which buffers a piece of a channel's data, with the bound on unread data."""

    def bounded(channel: paramiko.Channel, message: paramiko.Message) -> None:
        take(channel, message)
        if len(channel.in_buffer) + len(channel.in_stderr_buffer) > WINDOW + LARGEST_PACKET:
            raise paramiko.SSHException("the host sends more than the channel's window")

    return bounded


class _Transport(paramiko.Transport):
    """Ends when a host sends more than a channel's window. paramiko's own transport would buffer it all.

    It acknowledges a global request at once. sshd sends one with its host keys after the log-in. Until that is
    acknowledged, Nagle's algorithm in sshd's kernel keeps back the answer to the first channel: for 40 ms, because an
    acknowledgement is delayed as long.
    """

    _channel_handler_table = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_DATA: _within_window(paramiko.Channel._feed),  # type: ignore[attr-defined]
        MSG_CHANNEL_EXTENDED_DATA: _within_window(paramiko.Channel._feed_extended),  # type: ignore[attr-defined]
    }

    def _parse_global_request(self, message: paramiko.Message) -> None:
        if isinstance(self.sock, socket.socket):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        super()._parse_global_request(message)  # type: ignore[misc]


class _Verify(paramiko.MissingHostKeyPolicy):
    """Accepts only a host key that known_hosts has. paramiko itself knows no host key and always asks this policy."""

    def __init__(self, host: str, config: HostConfig, known: Known) -> None:
        self._host, self._key_name, self._known, self._revoked = host, config.key_name, known, config.revoked

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        shown = Key(key.get_name(), key.asbytes())
        what = f"{shown.type} {_fingerprint(shown.blob)}"
        if shown.blob in self._known.revoked or any(known_hosts.is_revoked(path, shown) for path in self._revoked):
            raise HostError(
                f"{self._host}: its host key is marked as revoked ({what}); this may be a man-in-the-middle attack",
                remedy="give the host a new key; if this one was revoked by mistake, remove the line with @revoked "
                f"for '{self._key_name}' from known_hosts",
            )
        if shown in self._known.keys:
            return
        same = [known for known in self._known.keys if known.type == shown.type]
        if same:
            raise HostError(
                f"{self._host}: its host key has changed: known_hosts has {_fingerprint(same[0].blob)}, "
                f"the host shows {_fingerprint(shown.blob)}; this may be a man-in-the-middle attack",
                remedy=f"if the host was reinstalled: `ssh-keygen -R '{self._key_name}'`, then `ssh {self._host} true`",
            )
        raise HostError(
            f"{self._host}: its host key is not in known_hosts ({what})",
            remedy=f"compare it with the key on the host, then add it: `ssh {self._host} true`",
        )


_RSA = re.compile(r"rsa-sha2-(256|512)")


def _fingerprint(blob: bytes) -> str:
    """Return a key's fingerprint as OpenSSH shows it: SHA256:..."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _explain(host: str, user: str, error: BaseException) -> NoReturn:
    """Raise HostError with the cause in one sentence for an exception of paramiko."""
    match error:
        case HostError():
            raise error
        case paramiko.AuthenticationException() | paramiko.PasswordRequiredException():
            raise HostError(
                f"{host}: {user} cannot log in ({error})",
                remedy=f"`ssh {user}@{host.rpartition('@')[2]} true` must work without a password",
            ) from None
        case paramiko.SSHException() if str(error) == "No authentication methods available":  # paramiko's words
            raise HostError(
                f"{host}: there is no key to log in as {user} with",
                remedy=f"`ssh {user}@{host.rpartition('@')[2]} true` must work without a password",
            ) from None
        case paramiko.SSHException() | OSError() | EOFError():
            raise HostError(
                f"{host}: the SSH session cannot be set up: {error or type(error).__name__}",
                remedy=f"does `ssh {host} true` work?",
            ) from None
        case _:
            raise error


def _socket(host: str, config: HostConfig) -> Any:
    """Return a connected socket to the host, direct or through the proxy."""
    address, port = config.address, config.port
    try:
        if config.proxy:
            return paramiko.ProxyCommand(shlex.join(config.proxy))
        sock = socket.create_connection((address, port), timeout=config.timeout)
        # The log-in sends several small messages in a row. Each would wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except socket.gaierror:
        raise HostError(f"{host}: the name {address} is unknown", remedy="is it spelled as in ~/.ssh/config?") from None
    except TimeoutError:
        raise HostError(f"{host}: no answer from {address} port {port} within {config.timeout:g} s") from None
    except OSError as error:
        what = f"run {config.proxy[0]}" if config.proxy else f"connect to {address} port {port}"
        raise HostError(
            f"{host}: cannot {what}: {error.strerror or error}",
            remedy="correct ProxyCommand or ProxyJump in ~/.ssh/config" if config.proxy
            else "is sshd running there, and is the port open?",
        ) from None  # fmt: skip
