"""The first process of a lab host, and of the bridge between the hosts. It runs under `python3 -I -S`.

The starter sends one JSON message over an inherited socket and gets answers:

    starter                                host
      | ---- the configuration -----------> |  joins its cgroups, makes its namespaces, forks
      | <--- {"pid": n} ------------------- |  its first process (also in the file `pid`)
      | ---- {} (its link exists) --------> |  mounts, addresses, sshd
      | <--- {"ready": true} -------------- |

If the starter dies before the end, the host exits too. Afterwards the first process reaps orphans. When it is killed,
the kernel kills all other processes of the host, and network and mounts vanish with their namespaces.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from migrate.lab.enter import namespace_flags
from migrate.paths import DATA
from runtime import sync
from runtime.cgroups.hierarchies import UNIFIED, discover
from runtime.linux import mount_flags, syscalls

_STEP_TIMEOUT = 60.0
_SSHD_TIMEOUT = 20.0
_PIPE_MAX_SIZE = 32 << 20


def _join_cgroups(directories: list[str]) -> None:
    """Join the host's cgroup of each controller before the cgroup namespace is made, whose root it becomes."""
    for hierarchy, directory in zip(discover(), directories, strict=True):
        hierarchy.make(directory)
        Path(directory, "cgroup.procs").write_text("0")


def _set_clocks(seconds: int) -> None:
    """Shift the host's clocks since boot from those of other hosts, before its first process exists."""
    with open("/proc/self/timens_offsets", "w") as file:
        file.write(f"monotonic {seconds} 0\nboottime {seconds} 0\n")


def _mount_system(config: dict[str, Any]) -> None:
    """Mount the host's own proc, sys, cgroups and run, and the files with its name and keys."""
    kinds = mount_flags.MS_NOSUID | mount_flags.MS_NODEV
    hierarchies = discover()  # while the machine's mounts are still visible
    syscalls.mount(None, "/", None, mount_flags.MS_REC | mount_flags.MS_PRIVATE)
    for place in ("/sys/fs/cgroup", "/sys"):  # the machine's would be visible below the host's
        if os.path.ismount(place):
            syscalls.umount(place, syscalls.MNT_DETACH)
    syscalls.mount("proc", "/proc", "proc", kinds | mount_flags.MS_NOEXEC)
    syscalls.mount("sysfs", "/sys", "sysfs", kinds | mount_flags.MS_NOEXEC)
    if [hierarchy.controllers for hierarchy in hierarchies] == [(UNIFIED,)]:
        syscalls.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", kinds)
        leaf = Path("/sys/fs/cgroup/init")  # a cgroup with processes cannot give controllers to its children
        leaf.mkdir()
        (leaf / "cgroup.procs").write_text("0")
    else:
        syscalls.mount("tmpfs", "/sys/fs/cgroup", "tmpfs", kinds, "mode=755")
        for hierarchy in hierarchies:
            directory = Path("/sys/fs/cgroup", os.path.basename(hierarchy.mountpoint))
            directory.mkdir()
            names = ",".join(hierarchy.controllers)
            if hierarchy.controllers == (UNIFIED,):
                syscalls.mount("cgroup2", directory, "cgroup2", kinds)
            else:
                options = f"none,{names}" if names.startswith("name=") else names
                syscalls.mount("cgroup", directory, "cgroup", kinds, options)
    for source, place in config["binds"].items():
        syscalls.mount(source, place, None, mount_flags.MS_BIND)
    size = f",size={config['disk']}" if config["disk"] else ""
    syscalls.mount("tmpfs", DATA, "tmpfs", kinds, f"mode=700{size}")
    log = os.open(config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    config_text = Path(config["sshd_config"]).read_text()
    key = Path(config["host_key"]).read_bytes()
    syscalls.mount("tmpfs", "/run", "tmpfs", kinds, "mode=755")
    # sshd's files are copied in, because their directory is hidden now.
    for name, data in (("sshd_config", config_text.encode()), ("host_key", key)):
        with open(os.open(f"/run/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    os.mkdir("/run/sshd", 0o755)
    os.mkdir("/run/lock", 0o1777)
    for fd in (1, 2):
        os.dup2(log, fd)


def _network(addresses: list[str]) -> None:
    """Make a bridge br0 with the host's addresses; eth0 is its first port, containers get others.

    A bridge without its own hardware address takes that of a port, which would change as containers come and go.
    """
    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")  # do not wait for duplicate address detection
    ethernet = Path("/sys/class/net/eth0/address").read_text().strip()
    for arguments in (
        ["link", "set", "lo", "up"],
        ["link", "add", "br0", "address", ethernet, "type", "bridge", "forward_delay", "0"],
        *(["addr", "add", address, "dev", "br0", *(["nodad"] if ":" in address else [])] for address in addresses),
        ["link", "set", "eth0", "master", "br0", "up"],
        ["link", "set", "br0", "up"],
    ):
        subprocess.run(["ip", *arguments], check=True, timeout=_STEP_TIMEOUT)


def _raise_pipe_size() -> None:
    """Raise the limit of pipes, because CRIU's page server needs large ones without CAP_SYS_RESOURCE."""
    path = Path("/proc/sys/fs/pipe-max-size")
    if int(path.read_text()) < _PIPE_MAX_SIZE:
        try:
            path.write_text(str(_PIPE_MAX_SIZE))
        except OSError:
            print("fs.pipe-max-size cannot be raised", file=sys.stderr)


def _start_sshd(address: str) -> None:
    """Start sshd and wait until it answers."""
    sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", "/run/sshd_config"], stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + _SSHD_TIMEOUT
    while True:
        try:
            with socket.create_connection((address, 22), timeout=5.0) as sock:
                if sock.recv(4) == b"SSH-":
                    return
        except OSError:
            if sshd.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _host(config: dict[str, Any], sock: socket.socket) -> None:
    """Set the host up as its first process, which only reaps afterwards."""
    syscalls.sethostname(config["name"])
    sync.receive(sock, _STEP_TIMEOUT, "lab up")
    os.environ.clear()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    _mount_system(config)
    _network(config["addresses"])
    _raise_pipe_size()
    _start_sshd(config["addresses"][0].partition("/")[0])


def _bridge(sock: socket.socket) -> None:
    sync.receive(sock, _STEP_TIMEOUT, "lab up")


def _reap() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            signal.pause()


def main(argv: list[str]) -> int:
    """Run the first process. argv: the descriptor of the socket to the starter."""
    sock = socket.socket(fileno=int(argv[0]))
    sock.set_inheritable(False)
    try:
        config = sync.receive(sock, _STEP_TIMEOUT, "lab up")
        _join_cgroups(config["cgroups"])
        bridge = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWPID
        syscalls.unshare(bridge if config["kind"] == "bridge" else namespace_flags())
        if config["kind"] == "host":
            _set_clocks(config["clock_offset"])
        pid = os.fork()
        if pid:
            temporary = Path(config["pid_file"] + ".new")
            temporary.write_text(str(pid))
            temporary.rename(config["pid_file"])
            sync.send(sock, {"pid": pid})
            os._exit(0)
        os.setsid()
        if config["kind"] == "bridge":
            _bridge(sock)
        else:
            _host(config, sock)
        sync.send(sock, {"ready": True})
        sock.close()
        _reap()
    except BaseException as error:
        with contextlib.suppress(OSError):  # the starter may be gone; this process goes too
            sync.send(sock, {"error": f"{type(error).__name__}: {error}"})
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
