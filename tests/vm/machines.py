"""Virtual machines under QEMU, linked to each other by a wire of their own; reached over ssh on loopback."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.support.hosts import Hosts
from tests.vm.images import CACHE, Image, Images

BOOT_TIMEOUT = 600.0
PROBE_TIMEOUT = 20.0
STOP_TIMEOUT = 60.0
MEMORY = "1024"
COMMAND_TIMEOUT = 120.0
MONITOR_TIMEOUT = 60.0
_ACCELERATORS = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"],
}
_KERNEL_ARGUMENTS = "root=/dev/vda console=ttyS0 quiet loglevel=4 net.ifnames=0 mitigations=off panic=-1"
AGENT = "/run/pymigrate/pymigrate.pyz"
BARE = ("python3", AGENT)  # the command line where nothing is installed, once something has come there


class MachineError(Exception):
    """A machine did not do what it was told."""


def _qemu(accelerator: str, image: Image, *options: str) -> list[str]:
    """The command of a machine, which loses its power when we die."""
    return [
        "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "q35", *_ACCELERATORS[accelerator],
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", _KERNEL_ARGUMENTS, *options,
    ]  # fmt: skip


def accelerator(image: Image) -> str:
    """ "kvm" if the image's kernel comes up under it, which is tried once a boot of this machine; else "tcg"."""
    known = CACHE / "accelerator"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError, ValueError):
        tried_in, found = known.read_text().split()
        if tried_in == boot:
            return found
    found = "kvm" if _comes_up("kvm", image) else "tcg"
    known.write_text(f"{boot} {found}\n")
    return found


def _comes_up(name: str, image: Image) -> bool:
    """Whether the initrd says so on the console within PROBE_TIMEOUT."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    ours, theirs = socket.socketpair()
    with ours, theirs:
        qemu = subprocess.Popen(
            _qemu(name, image, "-m", "256", "-serial", "stdio"), stdin=subprocess.DEVNULL, stdout=theirs,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        try:
            deadline, seen = time.monotonic() + PROBE_TIMEOUT, b""
            while b"initrd: Linux" not in seen:
                ours.settimeout(max(0.001, deadline - time.monotonic()))
                data = ours.recv(4096)
                if not data:
                    return False
                seen += data
            return True
        except TimeoutError:
            return False
        finally:
            qemu.kill()
            qemu.wait()


class Machine:
    """One machine with a disk of its own, a copy of the image's, which outlasts power_off.

    `number` tells its end of the wire (1 or 2) from the other one. All commands go through one ssh connection.
    """

    def __init__(self, name: str, number: int, image: Image, keys: Path, directory: Path, accel: str) -> None:
        self.name, self._number, self._accelerator = name, number, accel
        self._directory = directory
        self._qemu: subprocess.Popen[bytes] | None = None
        self._image = Image(self._file("raw"), self._file("kernel"), self._file("initrd"))
        self._identity = self._file("key")
        copies = {image.disk: self._image.disk, image.kernel: self._image.kernel, image.initrd: self._image.initrd}
        for source, copy in {**copies, keys / "tests": self._identity}.items():
            _command("cp", "--sparse=always", "--reflink=auto", "--preserve=mode", source, copy)
        self._file("known_hosts").write_text(f"{name} {(keys / f'{name}.host.pub').read_text()}")

    def _file(self, kind: str) -> Path:
        return self._directory / f"{self.name}.{kind}"

    @property
    def is_on(self) -> bool:
        return self._qemu is not None and self._qemu.poll() is None

    def power_on(self) -> None:
        """Start it, if it is off; `wait` tells when it is up."""
        if self.is_on:
            return
        ours, theirs = (self._directory / f"wire{number}" for number in (self._number, 3 - self._number))
        for path in (ours, self._file("monitor")):
            path.unlink(missing_ok=True)
        with self._file("qemu").open("wb") as log:
            self._qemu = subprocess.Popen(
                _qemu(
                    self._accelerator, self._image, "-name", self.name, "-smp", "1", "-m", MEMORY,
                    "-serial", f"file:{self._file('console')}", "-device", "virtio-rng-pci",
                    "-drive", f"file={self._image.disk},if=virtio,format=raw,cache=unsafe",
                    "-netdev", "user,id=outside,restrict=on,hostfwd=tcp:127.0.0.1:0-:22",
                    "-device", "virtio-net-pci,netdev=outside,romfile=",
                    "-netdev", f"dgram,id=wire,local.type=unix,local.path={ours},remote.type=unix,remote.path={theirs}",
                    "-device", f"virtio-net-pci,netdev=wire,mac=52:54:00:77:00:0{self._number},romfile=",
                    "-monitor", f"unix:{self._file('monitor')},server=on,wait=off",
                ),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._file("ssh_config").write_text(
            f"Host {self.name}\nHostName 127.0.0.1\nPort {self._port()}\nUser root\nHostKeyAlias {self.name}\n"
            f"IdentityFile {self._identity}\nIdentitiesOnly yes\nUserKnownHostsFile {self._file('known_hosts')}\n"
            f"StrictHostKeyChecking yes\nBatchMode yes\nConnectTimeout 20\nControlPath {self._file('ssh')}\n"
        )

    def _port(self) -> int:
        """The loopback port that QEMU has taken for the machine's sshd: its monitor tells."""
        deadline = time.monotonic() + MONITOR_TIMEOUT
        while time.monotonic() < deadline:
            self._require_on()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(str(self._file("monitor")))
                sock.sendall(b"info usernet\n")
                seen = b""
                while not (found := re.search(rb"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s", seen)):
                    data = sock.recv(4096)
                    if not data:
                        raise ConnectionError
                    seen += data
                return int(found[1])
            time.sleep(0.02)
        raise MachineError(f"{self.name}: QEMU's monitor does not answer")

    def wait(self) -> None:
        """Wait until it can be logged in to, and keep that connection, made anew, for all commands."""
        self._hang_up()
        null = subprocess.DEVNULL
        deadline = time.monotonic() + BOOT_TIMEOUT
        while time.monotonic() < deadline:
            self._require_on()
            with contextlib.suppress(subprocess.TimeoutExpired, subprocess.CalledProcessError):
                subprocess.run(
                    [*self._ssh("-M", "-N", "-f")], stdin=null, stdout=null, stderr=null, timeout=30, check=True
                )
                return
            time.sleep(0.2)
        raise MachineError(f"{self.name} did not come up within {BOOT_TIMEOUT:g} s:\n{self._tail('console')}")

    def _require_on(self) -> None:
        if not self.is_on:
            raise MachineError(f"{self.name}: QEMU has ended:\n{self._tail('qemu')}{self._tail('console')}")

    def _tail(self, kind: str) -> str:
        return self._file(kind).read_text(errors="replace")[-3000:] if self._file(kind).exists() else ""

    def _ssh(self, *options: str) -> list[str]:
        return ["ssh", "-F", str(self._file("ssh_config")), *options, self.name]

    def argv(self, *argv: object) -> list[str]:
        """The local command that runs a command in it."""
        return [*self._ssh(), "--", shlex.join(map(str, argv))]

    def put(self, directory: Path, place: str) -> None:
        """Make a directory of ours the directory `place` there."""
        _command(*self.argv("mkdir", "-p", place))
        _command("rsync", "-a", "-e", shlex.join(self._ssh()[:-1]), f"{directory}/", f"{self.name}:{place}/")

    def power_off(self) -> None:
        """Pull the plug: what its kernel had not written is lost."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None
        self._hang_up()

    def _hang_up(self) -> None:
        if self._file("ssh").exists():
            _command(*self._ssh("-O", "exit"), check=False)

    def shut_down(self) -> None:
        """Have it end in good order; pull the plug if it does not. Its disk and our key are gone then."""
        if self._qemu is not None and self.is_on:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _command(*self.argv("systemctl", "poweroff"), check=False)
                self._qemu.wait(STOP_TIMEOUT)
        self.power_off()
        for path in (self._image.disk, self._identity):
            path.unlink(missing_ok=True)


def _command(*argv: object, check: bool = True) -> None:
    done = subprocess.run(
        [str(part) for part in argv], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT
    )  # fmt: skip
    if check and done.returncode != 0:
        raise MachineError(f"{argv[0]} failed with status {done.returncode}: {done.stderr[-2000:]}")


class Machines(Hosts):
    """host1, where pymigrate is installed, and host2, a bare target. `pymigrate` is the command line of each."""

    python = "/opt/pymigrate/venv/bin/python"
    patience = 120.0  # without KVM everything takes ten to twenty times as long
    timeout = 600.0

    def __init__(self, images: Images, directory: Path) -> None:
        self.environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        self.pymigrate = {"host1": ("/usr/local/bin/pymigrate",), "host2": BARE}
        accel = accelerator(images.hosts["host1"])
        self._machines = {
            name: Machine(name, number, image, images.keys, directory, accel)
            for number, (name, image) in enumerate(images.hosts.items(), 1)
        }

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def up(self) -> None:
        """Start those that are off, and wait until they can be logged in to."""
        off = [machine for machine in self._machines.values() if not machine.is_on]
        for machine in off:
            machine.power_on()
        for machine in off:
            machine.wait()

    def power_off(self) -> None:
        for machine in self._machines.values():
            machine.power_off()

    def down(self) -> None:
        with contextlib.ExitStack() as stack:
            for machine in self._machines.values():
                stack.callback(machine.shut_down)  # the others too when one cannot be

    def argv(self, host: str, *argv: object) -> list[str]:
        if argv[0] == "pymigrate":
            argv = (*self.pymigrate[host], *argv[1:])
        return self._machines[host].argv(*argv)

    def put(self, host: str, directory: Path, place: str) -> None:
        self._machines[host].put(directory, place)

    def move(self, source: str, target: str, *options: str, container: str = "web") -> dict[str, Any]:
        """The report of a move, between machines that both have pymigrate; what it cost is printed."""
        argv = ("pymigrate", "--json", "move", "--timeout", "300", *options, container, target)
        report: dict[str, Any] = json.loads(self.on(source, *argv).stdout.splitlines()[-1])
        files = ", ".join(f"{done['files']} in {done['seconds']:.1f} s" for done in report["passes"])
        print(
            f"{container} to {target}: downtime {report['downtime_s']:.2f} s, total {report['total_s']:.1f} s, "
            f"{report['bytes_sent'] / 2**20:.1f} MiB; files: {files or 'none'}"
        )
        return report
