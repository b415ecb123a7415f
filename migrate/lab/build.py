"""Make a lab and take it down. `down` removes whatever exists, even after a crash."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from criu_rpc.errors import Error
from migrate.lab.model import CLIENT, LARGEST, Host, LabError, hosts, lab_cgroups
from migrate.paths import DATA
from migrate.paths import LAB as ROOT
from runtime import sync
from runtime.cgroups.hierarchies import remove_tree
from runtime.linux import processes, selfexec

STEP_TIMEOUT = 60.0
DOWN_TIMEOUT = 30.0
BRIDGE = "switch"

_SSHD_CONFIG = """\
Port 22
ListenAddress {address}
HostKey /run/host_key
PidFile /run/sshd.pid
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 100
Subsystem sftp internal-sftp
"""


def up(lab: str, names: list[str], *, disk: str | None = None) -> list[Host]:
    """Make a lab of hosts with these names, and the host `client`; a lab of the same name must not be up.

    `disk` limits /var/lib/pymigrate of each host, as a tmpfs size ("64m"). Raises LabError, and leaves nothing behind.
    """
    if any(processes.is_alive(host.pid, processes.start_time(host.pid)) for host in hosts(lab)):
        raise LabError(f"the lab {lab} is up already", remedy="pymigrate lab down")
    if len(names) > LARGEST or len(set(names)) != len(names):
        raise LabError(f"a lab can have at most {LARGEST} hosts, with different names")
    for program in ("/usr/sbin/sshd", "/usr/bin/ssh-keygen"):
        if not os.access(program, os.X_OK):
            raise LabError(f"{program} is missing", remedy="apt-get install openssh-server")
    if shutil.which("ip") is None:
        raise LabError("ip is missing", remedy="apt-get install iproute2")
    down(lab)  # remove what a crash may have left
    made = [*(Host(lab, name, number) for number, name in enumerate(names, 1)), Host(lab, CLIENT, LARGEST + 1)]
    try:
        (ROOT / lab).mkdir(mode=0o700, parents=True)
        _write_files(made)
        switch = _start(lab, BRIDGE, ROOT / lab / "switch.pid", {"kind": "bridge"})
        with switch.socket:
            bridge = ["ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0"]
            _in_network(switch.pid, bridge, ["ip", "link", "set", "br0", "up"])
            sync.send(switch.socket, {})
            sync.receive(switch.socket, STEP_TIMEOUT, "the bridge")
        for host in made:
            _start_host(host, switch.pid, disk)
    except (OSError, subprocess.SubprocessError, Error) as error:
        down(lab)
        raise LabError(f"the lab {lab} could not be made: {error}") from None
    except BaseException:
        down(lab)
        raise
    return made


class _Started:
    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid, self.socket = pid, sock


def _start(lab: str, name: str, pid_file: Path, config: dict[str, Any]) -> _Started:
    """Start a first process (host_init.py); return its pid and this end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = subprocess.DEVNULL
    with theirs:
        child = subprocess.Popen(
            selfexec.command("migrate.lab.host_init", str(theirs.fileno())), pass_fds=[theirs.fileno()],
            stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True,
        )  # fmt: skip
    try:
        cgroups = [str(path / name) for path in lab_cgroups(lab)]
        sync.send(ours, {**config, "cgroups": cgroups, "pid_file": str(pid_file)})
        pid = int(sync.receive(ours, STEP_TIMEOUT, f"host {name}")["pid"])
    except BaseException:
        child.kill()
        ours.close()
        raise
    finally:
        child.wait()
    return _Started(pid, ours)


def _start_host(host: Host, switch: int, disk: str | None) -> None:
    directory = host.directory
    for needed in ("/root/.ssh", DATA):
        Path(needed).mkdir(mode=0o700, parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "kind": "host",
        "name": host.name,
        "addresses": [f"{host.address}/24", *host.container_addresses],
        "disk": disk or "",
        "clock_offset": host.clock_offset,
        "log": str(directory / "log"),
        "sshd_config": str(directory / "sshd_config"),
        "host_key": str(directory / "host_key"),
        "binds": {
            str(directory / "hosts"): "/etc/hosts",
            str(directory / "hostname"): "/etc/hostname",
            str(directory / "ssh"): "/root/.ssh",
        },
    }
    Path("/etc/hostname").touch()
    started = _start(host.lab, host.name, directory / "pid", config)
    with started.socket:
        port = f"port{host.number}"
        _in_network(
            switch,
            ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(started.pid)],
            ["ip", "link", "set", port, "master", "br0", "up"],
        )
        sync.send(started.socket, {})
        sync.receive(started.socket, STEP_TIMEOUT, f"host {host.name}")


def _in_network(pid: int, *commands: list[str]) -> None:
    """Run commands in the network namespace of a process, but with the machine's pids and files."""
    for command in commands:
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{pid}/ns/net", *command], capture_output=True, text=True, timeout=STEP_TIMEOUT
        )  # fmt: skip
        if done.returncode != 0:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")


def _write_files(made: list[Host]) -> None:
    """Write keys, known_hosts, hosts and sshd_config of every host."""
    for host in made:
        (host.directory / "ssh").mkdir(mode=0o700, parents=True)
        for path in (host.directory / "host_key", host.directory / "ssh" / "id_ed25519"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"root@{host.name}", "-f", str(path)],
                check=True, timeout=STEP_TIMEOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
    authorized = "".join((host.directory / "ssh" / "id_ed25519.pub").read_text() for host in made)
    known = ""
    for host in made:
        key = " ".join((host.directory / "host_key.pub").read_text().split()[:2])
        known += f"{host.name},{host.address} {key}\n"
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made)
    for host in made:
        files = {
            "ssh/authorized_keys": authorized,
            "ssh/known_hosts": known,
            "hosts": names,
            "hostname": f"{host.name}\n",
            "sshd_config": _SSHD_CONFIG.format(address=host.address),
            "number": str(host.number),
        }
        for name, text in files.items():
            with open(os.open(host.directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
        # All users in the host may read these two.
        for name in ("hosts", "hostname"):
            (host.directory / name).chmod(0o644)


def down(lab: str) -> None:
    """Kill every process of a lab and remove all of it. Harmless if it is not up. Raises LabError."""
    deadline = time.monotonic() + DOWN_TIMEOUT
    groups = lab_cgroups(lab)
    # Killing the first process of each host kills all others; those of a half-made host are in the cgroups too.
    while pids := _pids(groups):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"lab {lab}: processes {', '.join(map(str, pids))} did not exit within {DOWN_TIMEOUT:g} s")
        time.sleep(0.01)
    for group in groups:
        try:
            remove_tree(str(group), deadline)
        except Error as error:
            raise LabError(f"lab {lab}: {error}") from None
    shutil.rmtree(ROOT / lab, ignore_errors=True)
    for directory in (ROOT, ROOT.parent):
        with contextlib.suppress(OSError):
            directory.rmdir()


def _pids(groups: list[Path]) -> list[int]:
    found: set[int] = set()
    for group in groups:
        for directory, _, _ in os.walk(group):
            with contextlib.suppress(OSError):
                # A frozen version 1 cgroup does not let its processes die.
                state = Path(directory, "freezer.state")
                if state.exists() and state.read_text().strip() != "THAWED":
                    state.write_text("THAWED")
                found |= {int(pid) for pid in Path(directory, "cgroup.procs").read_text().split()}
    return sorted(found)
