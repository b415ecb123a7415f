"""Podman and containerd at a host of tests, with the OCI runtime under test below them; nothing of them outlives it.

`ENGINE_RUNTIME=/usr/sbin/runc pytest tests/system/engines/test_engines.py` runs the same tests with runc, as a control.
"""

import contextlib
import json
import os
import pty
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.hosts import ROOTFS, Hosts

OTHER_RUNTIME = os.environ.get("ENGINE_RUNTIME")
PLACE = "/run/engine"  # a tmpfs in every kind of host
IMAGE = "localhost/busybox:latest"
_CRIU = "/opt/pymigrate/sbin"  # where provision.sh puts one if the distribution's does not work
_OWN = f"{PLACE}/tmp /dev/shm /var/lib/containers"
_TOP = Path(__file__).resolve().parents[2]

# `pymigrate` of this checkout, whatever is installed: engines hand on no PYTHONPATH, and not always a PATH.
_LAUNCHER = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(_TOP)!r})
from migrate.cli import main
sys.exit(main())
"""

# Podman's own defaults for ulimits want CAP_SYS_RESOURCE.
_CONTAINERS_CONF = f"""\
[containers]
default_ulimits = ["nofile=1024:20000", "nproc=32768:32768"]
netns = "none"
log_driver = "k8s-file"
[network]
network_backend = "netavark"
network_config_dir = "{PLACE}/networks"
[engine]
cgroup_manager = "{{cgroup_manager}}"
events_logger = "file"
runtime = "{{name}}"
runtime_supports_json = {{json}}
[engine.runtimes]
{{name}} = ["{{runtime}}"]
"""
_STORAGE_CONF = f"""\
[storage]
driver = "overlay"
graphroot = "{PLACE}/graph"
runroot = "{PLACE}/run"
"""
_CONTAINERD_TOML = f"""\
version = 2
root = "{PLACE}/containerd/root"
state = "{PLACE}/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{PLACE}/containerd/sock"
"""


class Engines:
    """The engines of one host. `runtime` is a path there; None is `pymigrate` of this checkout, or $ENGINE_RUNTIME."""

    def __init__(
        self, hosts: Hosts, host: str, runtime: str | None = OTHER_RUNTIME, cgroup_manager: str = "cgroupfs"
    ) -> None:
        self.hosts, self.host = hosts, host
        self.runtime = runtime or f"{PLACE}/pymigrate"
        self._cgroup_manager = cgroup_manager
        self._environment = {
            "PATH": f"{_CRIU}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "CONTAINERS_CONF": f"{PLACE}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{PLACE}/storage.conf",
            "TMPDIR": f"{PLACE}/tmp",
        }

    def up(self) -> None:
        """Configuration, and the image of all tests: busybox without a command."""
        # Podman's locks and a cache, whose places cannot be chosen, would be in common with the machine of a lab.
        self.sh(f"mkdir -p {_OWN} {PLACE}/context; for i in {_OWN}; do mount -t tmpfs engine $i; done")
        name = self.runtime.rpartition("/")[2]
        settings = {"name": name, "runtime": self.runtime, "cgroup_manager": self._cgroup_manager}
        for file, text in {
            "containers.conf": _CONTAINERS_CONF.format(json=json.dumps([name]), **settings),
            "containers-text.conf": _CONTAINERS_CONF.format(json="[]", **settings),
            "storage.conf": _STORAGE_CONF,
            "containerd.toml": _CONTAINERD_TOML,
            "pymigrate": _LAUNCHER,
        }.items():
            self.write(f"{PLACE}/{file}", text)
        self.sh(f"chmod 755 {PLACE}/pymigrate")
        self.hosts.put(self.host, ROOTFS, f"{PLACE}/rootfs")
        self.sh(f"tar -C {PLACE}/rootfs -c . | podman import - {IMAGE}")

    def down(self) -> None:
        """Take it all away from a host that stays. There are no containers any more."""
        self.podman("rmi", "-f", "-a")
        self.sh(f"umount {_OWN}; rm -rf {PLACE}")

    def write(self, path: str, text: str) -> None:
        """A file at the host."""
        self.sh(f"printf %s {shlex.quote(text)} > {path}")

    def sh(self, script: str, *, check: bool = True) -> str:
        """A shell script with the engines' environment; its output, both kinds."""
        return self._run("sh", "-c", f"exec 2>&1; {script}", check=check).stdout

    def podman(self, *argv: object, check: bool = True, text_errors: bool = False) -> "CompletedProcess[str]":
        """A podman command; `text_errors`: without a JSON log, the runtime's stderr tells what is wrong."""
        conf = [f"CONTAINERS_CONF={PLACE}/containers-text.conf"] if text_errors else []
        done = self._run(*(["env", *conf] if conf else []), "podman", *argv, check=False)
        if check and done.returncode != 0:
            logs = "".join(f" {PLACE}/graph/overlay-containers/*/userdata/{name}.log" for name in ("dump", "restore"))
            logs = self.sh(f"tail -n 8{logs}", check=False)
            raise AssertionError(f"podman {argv}: {done.stdout}{done.stderr}{logs}")
        return done

    def ctr(self, *argv: object, check: bool = True) -> "CompletedProcess[str]":
        """A ctr command to the containerd that `containerd()` runs."""
        return self._run("ctr", "--address", f"{PLACE}/containerd/sock", *argv, check=check)

    def on_terminal(self, *argv: object) -> tuple[int, str]:
        """A command on a terminal of its own, at a lab's host; its status and all that it wrote."""
        ours, theirs = pty.openpty()
        with open(ours, "rb", buffering=0) as terminal:
            process = subprocess.Popen(
                self.hosts.argv(self.host, *self._env(*argv)), env=self.hosts.environment, start_new_session=True,
                stdin=theirs, stdout=theirs, stderr=theirs,
            )  # fmt: skip
            os.close(theirs)
            seen = b""
            with contextlib.suppress(OSError):  # EIO: nobody has it open any more
                while data := terminal.read(4096):
                    seen += data
            return process.wait(timeout=30), seen.decode()

    def _env(self, *argv: object) -> list[object]:
        return ["env", *(f"{name}={value}" for name, value in self._environment.items()), *argv]

    def _run(self, *argv: object, check: bool = True) -> "CompletedProcess[str]":
        return self.hosts.on(self.host, *self._env(*argv), check=check)

    @contextlib.contextmanager
    def containerd(self) -> Iterator[None]:
        """A containerd that has the image too; ended on leaving, and its shims must be gone by then."""
        files = f"> {PLACE}/containerd.log 2>&1"
        command = f"echo $$ > {PLACE}/containerd.pid; exec containerd -c {PLACE}/containerd.toml {files}"
        daemon = self.hosts.start(self.host, *self._env("sh", "-c", command))
        try:
            while self.ctr("version", check=False).returncode != 0:
                assert daemon.poll() is None, self.sh(f"tail {PLACE}/containerd.log")
            self.podman("save", "-q", "--format", "oci-archive", "-o", f"{PLACE}/image.tar", IMAGE)
            self.ctr("images", "import", f"{PLACE}/image.tar")
            yield
        finally:
            self.sh(f"kill $(cat {PLACE}/containerd.pid)")
            daemon.communicate(timeout=30)

    def clear(self) -> None:
        """Remove all containers of podman's and containerd's, whatever state a test left them in."""
        self.podman("pod", "rm", "-f", "-a", "-t", "0", check=False)
        # Podman's own clean-up of one that has just died can be in the way of its removal.
        if self.podman("rm", "-f", "-a", "-t", "0", check=False).returncode != 0:
            self.podman("rm", "-f", "-a", "-t", "0")
        self.sh(f"rm -rf {PLACE}/context/*")
        if self._run("test", "-S", f"{PLACE}/containerd/sock", check=False).returncode == 0:
            for container in self.ctr("task", "ls", "-q", check=False).stdout.split():
                self.ctr("task", "rm", "-f", container)
            for container in self.ctr("container", "ls", "-q", check=False).stdout.split():
                self.ctr("container", "rm", container)

    def leftovers(self) -> str:
        """What is left when all containers are gone: states, monitors, shims, cgroups, mounts.

        Conmon exits by itself after podman has removed its container.
        """
        deadline = time.monotonic() + self.hosts.patience
        while (found := self._found()) and time.monotonic() < deadline:
            pass
        return found

    def _found(self) -> str:
        return self.sh(
            "ls -d /run/opencontainer/containers/* /run/containerd/runc/default/* /run/runc/* 2> /dev/null; "
            "for p in /proc/[0-9]*; do cat $p/cmdline 2> /dev/null | tr '\\0' ' ' | "
            "grep -E '^/usr/bin/(conmon|containerd-shim)|^[^ ]*(criu|python.* runtime\\.monitor\\.main) '; done; "
            "find /sys/fs/cgroup -type d '(' -path '*/libpod-*' -o -path '*/default/*' -o -path '*/buildah*' ')'; "
            f"grep -E ' {PLACE}/(graph|containerd)/.*/(merged|rootfs) ' /proc/self/mountinfo",
            check=False,
        )  # fmt: skip

    def status(self, container: str) -> str:
        """Podman's word for what a container of its own is doing: created, running, paused, exited..."""
        return self.podman("inspect", "-f", "{{.State.Status}}", container).stdout.strip()

    def logs(self, container: str) -> list[int]:
        """All numbers that a counting container of podman's has written."""
        return [int(line) for line in self.podman("logs", container).stdout.split()]

    def count(self, container: str, beyond: int) -> int:
        """Wait until a counting container of podman's has written a number beyond another one."""
        return self._wait(lambda: self.podman("logs", "--tail", "1", container).stdout, beyond)

    def count_in_file(self, container: str, beyond: int, file: str = "/n") -> int:
        """The same for one of containerd's, which writes its last number to a file."""
        command = ("task", "exec", "--exec-id", "count", container, "cat", file)
        return self._wait(lambda: self.ctr(*command, check=False).stdout, beyond)

    def _wait(self, read: Callable[[], str], beyond: int) -> int:
        deadline = time.monotonic() + self.hosts.patience
        while time.monotonic() < deadline:
            text = read().strip()
            if text.isdigit() and int(text) > beyond:
                return int(text)
        raise AssertionError(f"it does not count beyond {beyond}")
