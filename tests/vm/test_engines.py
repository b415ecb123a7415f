"""Engines where systemd makes the cgroups, and whose kernel tracks dirty pages."""

from collections.abc import Iterator

import pytest

from tests.support.engines import IMAGE, OTHER_RUNTIME, PLACE, Engines
from tests.support.hosts import COUNT
from tests.vm.machines import Machines


@pytest.fixture(scope="module")
def engine_host(machines_session: Machines) -> Iterator[Engines]:
    machines_session.up()
    engines = Engines(machines_session, "host1", OTHER_RUNTIME or "/usr/local/bin/pymigrate", "systemd")
    engines.up()
    yield engines
    engines.down()


@pytest.fixture
def engines(engine_host: Engines) -> Iterator[Engines]:
    yield engine_host
    engine_host.clear()
    assert engine_host.leftovers() == ""
    assert engine_host.sh("systemctl list-units --all --plain --no-legend 'libpod-*.scope' 'test-*.scope'") == ""


def counting(engines: Engines, *options: str) -> int:
    engines.podman("run", "-d", "--name", "c", *options, IMAGE, "sh", "-c", COUNT)
    return engines.count("c", 3)


def test_limits_of_a_scope(engines: Engines) -> None:
    counting(engines, "-m", "64m", "--pids-limit", "20", "--cpus", "0.5")
    pid = engines.podman("inspect", "-f", "{{.State.Pid}}", "c").stdout.strip()
    group = engines.sh(f"cut -d : -f 3 /proc/{pid}/cgroup").strip()
    assert group.startswith("/machine.slice/libpod-")
    files = " ".join(f"/sys/fs/cgroup{group.removesuffix('/container')}/{name}" for name in ("memory.max", "pids.max"))
    assert engines.sh(f"cat {files}").split() == [str(64 << 20), "20"]
    assert engines.podman("exec", "c", "cat", "/sys/fs/cgroup/cpu.max").stdout == "50000 100000\n"
    engines.podman("update", "--memory", "100m", "c")
    assert engines.sh(f"cat {files}").split() == [str(100 << 20), "20"]
    engines.podman("exec", "c", "true")
    engines.podman("pause", "c")
    engines.podman("unpause", "c")
    engines.count("c", engines.logs("c")[-1])


@pytest.mark.skipif("runc" in (OTHER_RUNTIME or ""), reason="runc restores it into a cgroup of the old name")
def test_checkpoint_and_restore_in_a_scope(engines: Engines) -> None:
    counting(engines, "-m", "64m")
    engines.podman("container", "checkpoint", "--export", f"{PLACE}/context/c.tar", "c")
    held = engines.logs("c")[-1]
    engines.podman("rm", "c")
    engines.podman("container", "restore", "--import", f"{PLACE}/context/c.tar", "--name", "d")
    engines.count("d", held)
    assert engines.podman("exec", "d", "cat", "/sys/fs/cgroup/memory.max").stdout == f"{64 << 20}\n"


@pytest.mark.parametrize("exported", [False, True])
def test_checkpoint_after_a_pre_checkpoint(engines: Engines, exported: bool) -> None:
    """The second one holds only the pages that have changed since."""
    # It sleeps long: while it forks its memory is there twice.
    script = "x=$(head -c 6000000 /dev/urandom | base64); " + COUNT.replace("usleep 20000", "sleep 1")
    engines.podman("run", "-d", "--name", "c", IMAGE, "sh", "-c", script)
    engines.count("c", 3)
    before, after = ((("-e", f"{PLACE}/context/{name}.tar") if exported else ()) for name in ("before", "after"))
    engines.podman("container", "checkpoint", "--pre-checkpoint", *before, "c")
    engines.count("c", engines.logs("c")[-1])
    bundle = engines.podman("inspect", "-f", "{{.StaticDir}}", "c").stdout.strip()
    engines.podman("container", "checkpoint", "--keep", "--with-previous", *after, "c")
    sizes = [
        sum(map(int, engines.sh(f"stat -c %s {bundle}/{name}/pages-*.img").split()))
        for name in ("pre-checkpoint", "checkpoint")
    ]
    assert sizes[0] > 6_000_000 > 4 * sizes[1]
    held = engines.logs("c")[-1]
    if exported:
        engines.podman("rm", "c")
        files = ("--import-previous", f"{PLACE}/context/before.tar", "--import", f"{PLACE}/context/after.tar")
        engines.podman("container", "restore", *files)
    else:
        engines.podman("container", "restore", "c")
    engines.count("c", held)


def test_containerd_with_scopes(engines: Engines) -> None:
    with engines.containerd():
        options = ("--runc-binary", engines.runtime, "--runc-systemd-cgroup", "--cgroup", "system.slice:test:c")
        engines.ctr("run", "-d", *options, "--memory-limit", str(64 << 20), IMAGE, "c", "sleep", "1000")
        pid = engines.ctr("task", "ls").stdout.splitlines()[1].split()[1]
        assert engines.sh(f"cat /proc/{pid}/cgroup") == "0::/system.slice/test-c.scope\n"
        assert engines.sh("cat /sys/fs/cgroup/system.slice/test-c.scope/memory.max") == f"{64 << 20}\n"
        assert '"pids"' in engines.ctr("task", "metrics", "--format", "json", "c").stdout
        engines.ctr("task", "rm", "-f", "c")
        engines.ctr("container", "rm", "c")
