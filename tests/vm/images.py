"""Disks of the two machines: built out of Debian's packages, kept in /var/cache/pymigrate/vm for the next run."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.services import ROOTFS

TOP = Path(__file__).resolve().parent.parent.parent
CACHE = Path("/var/cache/pymigrate/vm")
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}  # of br0, the bridge at both ends of the wire
ADDRESSES_6 = {"host1": "fd77::1", "host2": "fd77::2"}
BUILD_TIMEOUT = 900.0
DISK_SIZE = 4 << 30
ENGINES = ("containerd", "iptables", "netavark", "podman", "runc")  # on host1; iptables is for runc's checkpoints

_NETWORK = {
    "10-outside.network": "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\n",
    "20-bridge.netdev": "[NetDev]\nName=br0\nKind=bridge\n",
    "20-wire.network": "[Match]\nName=eth1\n[Network]\nBridge=br0\nLinkLocalAddressing=no\n",
    "30-inside.network": (
        "[Match]\nName=br0\n[Network]\nAddress={address}/24\nAddress={address6}/64\nLinkLocalAddressing=no\n"
    ),
}


@dataclass(frozen=True)
class Image:
    """What a machine boots: a raw disk, and kernel and initrd beside it."""

    disk: Path
    kernel: Path
    initrd: Path


@dataclass(frozen=True)
class Images:
    """Both machines' images, and the directory of keys (vagrant/pair): `keys/tests` is this machine's own."""

    hosts: dict[str, Image]
    keys: Path


@contextmanager
def built(debian: str) -> Iterator[Images]:
    """Images of Debian `debian` ("12" or "13") with this very checkout installed on host1; host2 is a bare target.

    Another session may replace them afterwards: what is needed longer is to be copied.
    """
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        trees = _kept(f"debian{debian}-trees", _TREE_SOURCES, lambda place: _make_trees(debian, place), *ENGINES)
        sources = [*_TREE_SOURCES, "tests/vm/images.py", "vagrant/pair", *_code()]
        made = _kept(f"debian{debian}-disks", sources, lambda place: _make_disks(trees, place), trees.name)
        yield Images(
            {
                name: Image(made / f"{name}.raw", trees / tree / "vmlinuz", trees / tree / "initrd.img")
                for name, tree in _TREES.items()
            },
            made / "keys",
        )


_TREES = {"host1": "source", "host2": "peer"}
_TREE_SOURCES = ["vagrant/make-tree", "vagrant/provision.sh", "vagrant/wheel-store.py", "pyproject.toml"]


def _code() -> list[str]:
    return [
        str(path.relative_to(TOP)) for name in ("criu_rpc", "runtime", "migrate") for path in (TOP / name).rglob("*.py")
    ]


def _kept(kind: str, sources: list[str], make: Callable[[Path], None], *more: str) -> Path:
    """CACHE/KIND-DIGEST, made if it is not there; the digest is of the contents of `sources`. Older ones go."""
    digest = hashlib.sha256(repr(more).encode())
    for source in sorted(sources):
        digest.update(source.encode() + b"\0" + hashlib.sha256((TOP / source).read_bytes()).digest())
    place = CACHE / f"{kind}-{digest.hexdigest()[:16]}"
    if not place.exists():
        for old in CACHE.glob(f"{kind}-*"):
            shutil.rmtree(old)
        new = CACHE / f"{kind}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        make(new)
        new.rename(place)
    return place


def _make_trees(debian: str, place: Path) -> None:
    _run(TOP / "vagrant/make-tree", debian, place / "peer")
    _run(TOP / "vagrant/make-tree", debian, place / "source", "--demo", "dbus", *ENGINES)


def _make_disks(trees: Path, place: Path) -> None:
    keys = place / "keys"
    _run(TOP / "vagrant/pair", "keys", keys, *(f"{name}={address}" for name, address in ADDRESSES.items()))
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", keys / "tests")
    for name, tree in _TREES.items():
        root = place / "root"
        _run("cp", "-a", "--reflink=auto", trees / tree / "tree", root)
        try:
            _settle_in(root, name, keys)
            if tree == "source":
                _install(root)
            disk = place / f"{name}.raw"
            with disk.open("wb") as file:
                file.truncate(DISK_SIZE)
            _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", root, disk)
        finally:
            shutil.rmtree(root)


def _settle_in(root: Path, name: str, keys: Path) -> None:
    """Name, addresses, keys and the root file system of services of one machine."""
    (root / "etc/hostname").write_text(f"{name}\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    services = root / ROOTFS.relative_to("/")
    services.parent.mkdir(parents=True, exist_ok=True)
    _run("cp", "-a", ROOTFS, services)
    (root / "etc/fstab").unlink()  # the initrd mounts the root for good, and nothing is to be checked
    _run(TOP / "vagrant/pair", "join", keys, name, root)
    with (root / "root/.ssh/authorized_keys").open("a") as file:
        file.write((keys / "tests.pub").read_text())
    for file_name, text in _NETWORK.items():
        path = root / "etc/systemd/network" / file_name
        path.write_text(text.format(address=ADDRESSES[name], address6=ADDRESSES_6[name]))
        path.chmod(0o644)


def _install(root: Path) -> None:
    """The wheel of this checkout, by the provisioning script; everything else is there already."""
    source = root / "usr/src/pymigrate"
    for name in ("README.md", "pyproject.toml", "vagrant/provision.sh", *_code()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TOP / name, source / name)
    _run("chroot", root, "/usr/src/pymigrate/vagrant/provision.sh", "--image")
    shutil.rmtree(source)


def _run(*argv: object) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "CERT" in name}
    if argv[0] == "chroot":
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    process = subprocess.Popen(
        [str(part) for part in argv], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=BUILD_TIMEOUT)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # scripts remove what they have begun
        process.communicate()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed with status {process.returncode}:\n{out[-6000:]}")
