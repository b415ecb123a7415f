"""Read OpenSSH's known_hosts files (sshd(8)): which keys a host may show, and which are revoked.

paramiko's own reader stops at a line with a marker and does not support patterns. Here an invalid line is ignored, as
by OpenSSH. A line with `@cert-authority` is skipped, because paramiko cannot check the certificate of a host.
"""

import base64
import binascii
import contextlib
import fnmatch
import hashlib
import hmac
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import HostError
from migrate.limits import KRL_TIMEOUT

LARGEST = 64 << 20  # bytes of one file
_KRL = b"SSHKRL\n\0"
_LONGEST = 64 << 10  # bytes of one line
_MAGIC = re.compile(r"([\[\]])")


@dataclass(frozen=True)
class Key:
    """A public key: its type, such as "ssh-ed25519", and its encoding (RFC 4253, 6.6)."""

    type: str
    blob: bytes


@dataclass(frozen=True)
class Known:
    """The keys of one host: those that it may show, in the order of the files, and the revoked ones."""

    keys: tuple[Key, ...]
    revoked: frozenset[bytes]


def look(paths: Iterable[Path], name: str) -> Known:
    """Return the keys of host `name` ("host" or "[host]:port") in the files that exist.

    Raises HostError for a file that cannot be read, because it may revoke a key.
    """
    keys: list[Key] = []
    revoked: set[bytes] = set()
    for path in paths:
        for line in _lines(path):
            fields = line.split()
            marker = fields.pop(0) if fields[:1] and fields[0].startswith(b"@") else b""
            if len(fields) < 3 or marker not in (b"", b"@revoked"):
                continue
            key = _key(fields[1], fields[2])
            if key is None or not _matches(fields[0].decode(errors="replace"), name.lower()):
                continue
            if marker:
                revoked.add(key.blob)
            else:
                keys.append(key)
    return Known(tuple(dict.fromkeys(keys)), frozenset(revoked))


def is_revoked(path: Path, key: Key) -> bool:
    """Whether a file of RevokedHostKeys has a key: a list of keys, or a key revocation list (ssh-keygen(1)).

    Raises HostError if that cannot be determined, because OpenSSH then refuses every host.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_KRL)) != _KRL:
                lines = (line.split() for line in _lines(path))
                return any(_key(*fields[:2]) == key for fields in lines if len(fields) > 1)
        line = f"{key.type} {base64.b64encode(key.blob).decode()}\n"
        done = subprocess.run(
            ["ssh-keygen", "-Q", "-f", path, "/dev/stdin"],
            input=line, capture_output=True, text=True, timeout=KRL_TIMEOUT,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{path}: cannot be searched for revoked host keys: {error}") from None
    if done.returncode and "REVOKED" not in done.stdout:
        raise HostError(f"{path}: cannot be searched for revoked host keys: {done.stderr.strip()[-200:]}")
    return done.returncode != 0


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without comments and lines that are too long."""
    try:
        with open(path, "rb", opener=_open) as file:
            left, long = LARGEST, False
            while line := file.readline(_LONGEST):
                left -= len(line)
                if left < 0:
                    raise HostError(f"{path}: is larger than {LARGEST >> 20} MiB", remedy=_REMEDY)
                whole = line.endswith(b"\n") or len(line) < _LONGEST
                if whole and not long and not line.lstrip().startswith(b"#"):
                    yield line
                long = not whole
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}", remedy=_REMEDY) from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # it may be a fifo


_REMEDY = "correct UserKnownHostsFile or GlobalKnownHostsFile in ~/.ssh/config, or the file"


def _key(type_: bytes, text: bytes) -> Key | None:
    with contextlib.suppress(binascii.Error, ValueError):
        blob = base64.b64decode(text, validate=True)
        if blob[:4] == len(type_).to_bytes(4, "big") and blob[4:].startswith(type_):
            return Key(type_.decode("ascii"), blob)
    return None


def _matches(hosts: str, name: str) -> bool:
    """Whether the first field of a line matches a host: one hashed name, or a list of patterns."""
    if hosts.startswith("|"):
        return _is_hash_of(hosts, name)
    found = False
    for pattern in hosts.lower().split(","):
        # OpenSSH does not support the brackets of fnmatch.
        if fnmatch.fnmatchcase(name, _MAGIC.sub(r"[\1]", pattern.removeprefix("!"))):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _is_hash_of(hashed: str, name: str) -> bool:
    """Whether `hashed` is that of a name: |1|SALT|HMAC-SHA1, both in base64."""
    try:
        nothing, version, *parts = hashed.split("|")
        salt, digest = (base64.b64decode(part, validate=True) for part in parts)
    except (binascii.Error, ValueError):
        return False
    return (nothing, version) == ("", "1") and hmac.digest(salt, name.encode(), hashlib.sha1) == digest
