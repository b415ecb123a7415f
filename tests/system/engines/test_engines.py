"""Podman, its builds, and containerd run, checkpoint and restore containers with the runtime under test.

See tests/support/engines.py for how to run them with another runtime.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.support.engines import IMAGE, OTHER_RUNTIME, PLACE, Engines
from tests.support.hosts import COUNT
from tests.system.conftest import Lab

# Nobody reads the output of a detached container of containerd's: it counts in a file, and in another says who it is.
COUNT_IN_FILE = "read u < /proc/sys/kernel/random/uuid; echo $u > /run-name; " + COUNT.replace(
    "echo $i", "echo $i > /n; echo $u > /u"
)


def whole_line(file: str) -> tuple[str, ...]:
    """Return the command that prints a file which the program empties and writes again in every step."""
    return ("sh", "-c", f"until read line < {file}; do :; done; echo $line")


@pytest.fixture(scope="module")
def engine_host() -> Iterator[Engines]:
    for program in ("podman", "containerd"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: run `make setup-vm`")
    lab = Lab(f"engines-{os.getpid()}")
    lab.lab("up")
    try:
        engines = Engines(lab, "host1")
        engines.up()
        yield engines
    finally:
        lab.lab("down")


@pytest.fixture
def engines(engine_host: Engines) -> Iterator[Engines]:
    """Engines without containers; a test must leave nothing once its containers have been removed."""
    yield engine_host
    engine_host.clear()
    assert engine_host.leftovers() == ""


@pytest.fixture(scope="module")
def containerd_host(engine_host: Engines) -> Iterator[Engines]:
    with engine_host.containerd():
        yield engine_host


@pytest.fixture
def containerd(containerd_host: Engines, engines: Engines) -> Engines:
    return engines


ROOT = "/run/opencontainer/containers"


def cgroup_file(v1: str, v2: str) -> str:
    """A shell word: the contents of a file of the container's own cgroup, whichever version the host has."""
    return f"$(cat /sys/fs/cgroup/{v1} 2> /dev/null || cat /sys/fs/cgroup/{v2})"


# Podman


def test_output_and_exit_status(engines: Engines) -> None:
    done = engines.podman("run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 3", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_input(engines: Engines) -> None:
    assert engines.sh(f"echo hello | podman run -i --rm {IMAGE} cat") == "hello\n"


def test_environment_directory_and_user(engines: Engines) -> None:
    script = "echo $A $(pwd) $(id -u):$(id -g) $(id -G) $(umask) $(hostname)"
    options = (
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "--user",
        "1000:1001",
        "--group-add",
        "5",
        "--umask",
        "027",
        "--hostname",
        "h",
    )
    assert engines.podman("run", "--rm", *options, IMAGE, "sh", "-c", script).stdout == (
        "b /tmp 1000:1001 1001 5 0027 h\n"
    )


def test_bind_mounts_and_read_only_root(engines: Engines) -> None:
    engines.write(f"{PLACE}/context/file", "x")
    script = (
        "cat /data/file; touch /data/new || echo ro; touch /new || echo root; echo y > /tmp/z; echo y > /t/z; cat /t/z"
    )
    done = engines.podman(
        "run", "--rm", "--read-only", "-v", f"{PLACE}/context:/data:ro", "--tmpfs", "/t", IMAGE, "sh", "-c", script
    )  # fmt: skip
    assert done.stdout == "xro\nroot\ny\n"
    engines.podman("run", "--rm", "-v", f"{PLACE}/context:/data", IMAGE, "sh", "-c", "echo y > /data/new")
    assert engines.sh(f"cat {PLACE}/context/new") == "y\n"


def test_limits(engines: Engines) -> None:
    memory = cgroup_file("memory/memory.limit_in_bytes", "memory.max")
    quota = cgroup_file("cpu/cpu.cfs_quota_us", "cpu.max")
    pids = cgroup_file("pids/pids.max", "pids.max")
    options = ("-m", "64m", "--cpus", "0.5", "--pids-limit", "20", "--cpuset-cpus", "0")
    script = f"echo {memory} {quota} {pids} $(nproc)"
    memory, quota, *_, pids, cpus = engines.podman("run", "--rm", *options, IMAGE, "sh", "-c", script).stdout.split()
    assert (memory, quota, pids, cpus) == ("67108864", "50000", "20", "1")


def test_too_many_processes_are_refused(engines: Engines) -> None:
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait"
    done = engines.podman("run", "--rm", "--pids-limit", "4", IMAGE, "sh", "-c", script, check=False)
    assert "can't fork" in done.stderr
    assert done.returncode != 0


def test_more_memory_than_allowed_is_fatal(engines: Engines) -> None:
    options = ("--rm", "-m", "16m", "--memory-swap", "16m")
    done = engines.podman(
        "run", *options, IMAGE, "sh", "-c", "x=$(head -c 50000000 /dev/zero | tr '\\0' x)", check=False
    )
    assert done.returncode == 137


def test_default_capabilities_and_seccomp(engines: Engines) -> None:
    script = (
        "grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|Seccomp|NoNewPrivs):' /proc/self/status; "
        "linux32 true && echo linux32; linux32 -R true"
    )
    done = engines.podman("run", "--rm", IMAGE, "sh", "-c", script, check=False)
    found = dict(line.split(":\t") for line in done.stdout.splitlines()[:-1])
    capabilities = "00000000a80425fb"  # the 14 of containers.conf(5), default_capabilities
    assert found == {
        "CapInh": "0" * 16, "CapPrm": capabilities, "CapEff": capabilities, "CapBnd": capabilities, "CapAmb": "0" * 16,
        "NoNewPrivs": "0", "Seccomp": "2",
    }  # fmt: skip
    # personality(2) is allowed for some arguments; with others it has the profile's default error.
    assert done.stdout.endswith("linux32\n")
    assert "Function not implemented" in done.stderr
    engines.podman("run", "--rm", "--security-opt", "seccomp=unconfined", IMAGE, "linux32", "-R", "true")


def test_privileged(engines: Engines) -> None:
    script = "grep -E '^(CapEff|Seccomp):' /proc/self/status; mount -t tmpfs none /tmp && ls -d /dev/kmsg"
    done = engines.podman("run", "--rm", "--privileged", IMAGE, "sh", "-c", script)
    found = done.stdout.split()
    assert int(found[1], 16) & 1 << 21, "CAP_SYS_ADMIN"
    assert found[2:] == ["Seccomp:", "0", "/dev/kmsg"]


def test_no_new_privileges_and_devices(engines: Engines) -> None:
    options = ("--security-opt", "no-new-privileges", "--device", "/dev/null:/dev/nothing")
    script = "grep NoNewPrivs /proc/self/status; echo x > /dev/nothing; mknod /d b 7 0 && cat /d"
    done = engines.podman("run", "--rm", *options, IMAGE, "sh", "-c", script, check=False)
    assert done.stdout == "NoNewPrivs:\t1\n"
    assert done.stderr == "cat: can't open '/d': Operation not permitted\n"


def test_terminal(engines: Engines) -> None:
    script = "tty; test -t 0 && echo terminal; exit 4"
    assert engines.sh(f"podman run -t --rm {IMAGE} sh -c '{script}' | od -A n -c | tr -d ' \\n'") == (
        r"/dev/pts/0\r\nterminal\r\n"
    )
    assert engines.podman("run", "-t", "--rm", IMAGE, "sh", "-c", script, check=False).returncode == 4
    status, out = engines.on_terminal("podman", "run", "-it", "--rm", IMAGE, "sh", "-c", "tty; ls -l /dev/console")
    assert status == 0
    assert re.match(r"/dev/pts/0\s+crw--w----\s+1 root +5 +136, +0 ", out), out


def test_preserved_file_descriptors_and_no_others(engines: Engines) -> None:
    """Podman hands its own files on to the runtime, which must not."""
    engines.write(f"{PLACE}/context/file", "x")
    script = "cat <&3; ls /proc/self/fd"  # 4: the directory that ls has open
    opened = f"7< {PLACE}/context/file 3< {PLACE}/context/file"
    assert engines.sh(f"podman run --rm --preserve-fds 1 {IMAGE} sh -c '{script}' {opened}") == "x0\n1\n2\n3\n4\n"


def test_init_process_and_its_environment(engines: Engines) -> None:
    """What monitors and engines have in their environment is no business of a container's."""
    done = engines.podman("run", "--rm", IMAGE, "sh", "-c", "cat /proc/1/environ | tr '\\0' '\\n' | cut -d = -f 1")
    assert sorted(done.stdout.split()) == ["HOME", "HOSTNAME", "PATH", "TERM", "container"]


@pytest.mark.parametrize("text_errors", [False, True])
def test_command_that_cannot_be_run(engines: Engines, text_errors: bool) -> None:
    """Podman makes 127 and 126 out of the runtime's words, which it reads from a JSON log or from stderr."""
    for command, status, said in (("nosuch", 127, "not found"), ("/etc/passwd", 126, "permission denied")):
        done = engines.podman("run", "--rm", IMAGE, command, check=False, text_errors=text_errors)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert command in done.stderr
        assert said in done.stderr.lower()
    engines.podman("run", "-d", "--name", "c", IMAGE, "sleep", "100")
    for command, status in (("nosuch", 127), ("/etc/passwd", 126)):
        done = engines.podman("exec", "c", command, check=False, text_errors=text_errors)
        assert done.returncode == status, done.stderr
        assert command in done.stderr


def test_what_the_runtime_refuses_is_told(engines: Engines) -> None:
    done = engines.podman("run", "--rm", "--sysctl", "net.ipv4.nosuch=1", IMAGE, "true", check=False)
    assert done.returncode in (125, 126, 127)
    assert "nosuch" in done.stderr
    assert "Traceback" not in done.stderr


def test_detached_container(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", IMAGE, "sh", "-c", COUNT)
    first = engines.count("c", 1)
    assert engines.status("c") == "running"
    assert engines.podman("exec", "c", "sh", "-c", "echo $A; cat; exit 9", check=False).returncode == 9
    assert engines.podman(
        "exec", "-e", "A=b", "-w", "/tmp", "--user", "7", "c", "sh", "-c", "echo $A $(pwd) $(id -u)"
    ).stdout == ("b /tmp 7\n")
    assert engines.sh("echo hello | podman exec -i c cat") == "hello\n"
    done = engines.podman("exec", "-t", "c", "sh", "-c", "tty; exit 6", check=False)
    assert (done.returncode, done.stdout.strip()) == (6, "/dev/pts/0")
    engines.podman("exec", "-d", "c", "sh", "-c", "echo $$ > /pid; exec sleep 77")
    top = engines.podman("top", "c", "args").stdout
    assert "sleep 77" in top or engines.podman("top", "c", "args").stdout
    assert "1 root" in engines.podman("exec", "c", "ps").stdout
    numbers = engines.logs("c")
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers[-1] >= first
    assert engines.podman("rm", "-f", "-t", "0", "c").stdout == "c\n"


def test_exec_has_the_capabilities_and_filter_of_the_container(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", "--cap-drop", "all", IMAGE, "sleep", "100")
    script = "grep -E '^(CapEff|CapBnd|Seccomp):' /proc/self/status"
    assert engines.podman("exec", "c", "sh", "-c", script).stdout.split() == [
        "CapEff:", "0" * 16, "CapBnd:", "0" * 16, "Seccomp:", "2",
    ]  # fmt: skip


def test_stop_of_one_that_does_not_listen(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", IMAGE, "sh", "-c", f"trap '' TERM; {COUNT}")
    engines.count("c", 0)
    engines.podman("stop", "-t", "1", "c")
    assert engines.podman("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "c").stdout == "exited 137\n"
    engines.podman("start", "c")
    engines.podman("stop", "-t", "0", "c")


def test_stop_of_one_that_listens_and_kill(engines: Engines) -> None:
    engines.podman(
        "run", "-d", "--name", "c", IMAGE, "sh", "-c", f"trap 'exit 5' TERM; trap 'echo 1000000' USR1; {COUNT}"
    )
    engines.count("c", 0)
    engines.podman("kill", "-s", "USR1", "c")
    while 1000000 not in engines.logs("c"):
        pass
    engines.podman("stop", "-t", "60", "c")
    assert engines.podman("wait", "c").stdout == "5\n"
    done = engines.podman("kill", "c", check=False)
    assert done.returncode != 0


def test_death_is_noticed(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", IMAGE, "sleep", "100")
    engines.podman("kill", "c")
    assert engines.podman("wait", "c").stdout == "137\n"


def test_pause_stops_the_counting(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", IMAGE, "sh", "-c", COUNT)
    engines.count("c", 1)
    engines.podman("pause", "c")
    assert engines.status("c") == "paused"
    assert engines.podman("exec", "c", "true", check=False).returncode != 0
    held = engines.logs("c")
    engines.podman("run", "--rm", IMAGE, "sleep", "0.3")  # it would write some 15 numbers meanwhile
    assert engines.logs("c") == held
    engines.podman("unpause", "c")
    engines.count("c", held[-1])
    engines.podman("pause", "c")  # and goes, paused as it is


def test_update(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", IMAGE, "sleep", "100")
    engines.podman("update", "--memory", "100m", "--cpus", "0.25", "c")
    memory = cgroup_file("memory/memory.limit_in_bytes", "memory.max")
    quota = cgroup_file("cpu/cpu.cfs_quota_us", "cpu.max")
    memory, quota, *_ = engines.podman("exec", "c", "sh", "-c", f"echo {memory} {quota}").stdout.split()
    assert (int(memory), int(quota)) == (100 << 20, 25000)


def test_statistics(engines: Engines) -> None:
    engines.podman("run", "-d", "--name", "c", IMAGE, "sleep", "100")
    assert engines.podman("stats", "--no-stream", "--format", "{{.PIDs}}", "c").stdout == "1\n"


def test_restart_policy(engines: Engines) -> None:
    engines.podman("run", "--name", "c", "--restart", "on-failure:2", IMAGE, "sh", "-c", "echo x; exit 3", check=False)
    while engines.podman("inspect", "-f", "{{.RestartCount}} {{.State.Status}}", "c").stdout != "2 exited\n":
        pass
    assert engines.podman("logs", "c").stdout == "x\nx\nx\n"


def test_health_check(engines: Engines) -> None:
    options = ("--health-cmd", "test -e /healthy", "--health-interval", "disable")
    engines.podman("run", "-d", "--name", "c", *options, IMAGE, "sleep", "100")
    assert engines.podman("healthcheck", "run", "c", check=False).returncode == 1
    engines.podman("exec", "c", "touch", "/healthy")
    assert engines.podman("healthcheck", "run", "c").stdout.strip() in ("", "healthy")


def test_network_of_a_bridge(engines: Engines) -> None:
    """A namespace that podman has made and gives the path of."""
    done = engines.podman(
        "run", "--rm", "--network", "bridge", IMAGE, "sh", "-c", "ip -4 addr show eth0; cat /etc/hosts"
    )
    assert "inet 10.88." in done.stdout
    engines.podman("run", "--rm", "--network", "host", IMAGE, "ip", "addr", "show", "eth0")


def test_namespaces_of_the_host_and_of_another_container(engines: Engines) -> None:
    options = ("--pid", "host", "--ipc", "host", "--uts", "host")
    assert engines.podman("run", "--rm", *options, IMAGE, "hostname").stdout == "host1\n"
    engines.podman("run", "-d", "--name", "c", IMAGE, "sleep", "77")
    done = engines.podman("run", "--rm", "--pid", "container:c", "--network", "container:c", IMAGE, "ps")
    assert "sleep 77" in done.stdout


def test_user_namespace(engines: Engines) -> None:
    maps = ("--uidmap", "0:100000:1000", "--gidmap", "0:100000:1000")
    engines.podman("run", "-d", "--name", "c", *maps, IMAGE, "sh", "-c", "touch /mine; exec sleep 77")
    pid = engines.podman("inspect", "-f", "{{.State.Pid}}", "c").stdout.strip()
    assert engines.sh(f"stat -c %u /proc/{pid}") == "100000\n"
    assert engines.podman("exec", "c", "id", "-u").stdout == "0\n"


# Checkpoints by podman


def counting(engines: Engines, *options: str) -> int:
    engines.podman("run", "-d", "--name", "c", *options, IMAGE, "sh", "-c", COUNT)
    return engines.count("c", 3)


def test_checkpoint_and_restore(engines: Engines) -> None:
    before = counting(engines)
    engines.podman("container", "checkpoint", "c")
    assert engines.status("c") == "exited"
    assert engines.podman("inspect", "-f", "{{.State.Checkpointed}}", "c").stdout == "true\n"
    held = engines.logs("c")
    engines.podman("container", "restore", "c")
    engines.count("c", max(held[-1], before))
    numbers = engines.logs("c")
    assert numbers == list(range(1, len(numbers) + 1))
    assert engines.podman("exec", "c", "echo", "x").stdout == "x\n"
    engines.podman("kill", "-s", "TERM", "c")  # init of a pid namespace does not listen
    engines.podman("stop", "-t", "0", "c")
    assert engines.podman("wait", "c").stdout == "137\n"


def test_checkpoint_that_is_kept_and_its_numbers(engines: Engines) -> None:
    counting(engines)
    done = engines.podman("container", "checkpoint", "--keep", "--print-stats", "c")
    assert '"pages_written"' in done.stdout
    bundle = engines.podman("inspect", "-f", "{{.StaticDir}}", "c").stdout.strip()
    assert "Dumping finished successfully" in engines.sh(f"cat {bundle}/dump.log")
    held = engines.logs("c")[-1]
    done = engines.podman("container", "restore", "--keep", "--print-stats", "c")
    assert '"pages_restored"' in done.stdout
    assert "Restore finished successfully" in engines.sh(f"cat {bundle}/restore.log")
    engines.count("c", held)
    engines.sh(f"test -e {bundle}/checkpoint/inventory.img")


def test_checkpoint_that_leaves_the_container_running(engines: Engines) -> None:
    counting(engines)
    engines.podman("container", "checkpoint", "--leave-running", "c")
    assert engines.status("c") == "running"
    engines.count("c", engines.logs("c")[-1])
    numbers = engines.logs("c")
    assert numbers == list(range(1, len(numbers) + 1))


def test_checkpoint_that_is_exported_and_imported(engines: Engines) -> None:
    """Under another name: another id, bundle, root file system and cgroup than those in the images."""
    counting(engines, "-m", "64m")
    engines.podman("exec", "c", "sh", "-c", "echo kept > /file")
    engines.podman("container", "checkpoint", "--export", f"{PLACE}/context/c.tar", "c")
    held = engines.logs("c")[-1]
    engines.podman("rm", "-f", "-t", "0", "c")
    for name in ("d", "e"):
        engines.podman("container", "restore", "--import", f"{PLACE}/context/c.tar", "--name", name)
    for name in ("d", "e"):
        engines.count(name, held)
        numbers = engines.logs(name)
        assert numbers == list(range(1, len(numbers) + 1))  # the log travels too
        assert engines.podman("exec", name, "cat", "/file").stdout == "kept\n"
        pid = engines.podman("inspect", "-f", "{{.State.Pid}}", name).stdout.strip()
        container = engines.podman("inspect", "-f", "{{.Id}}", name).stdout.strip()
        group = engines.sh(f"grep -E ':memory:|^0::.*libpod' /proc/{pid}/cgroup | head -n 1").strip().rpartition(":")[2]
        assert container in group
        files = (f"memory{group}/memory.limit_in_bytes", f"{group[1:]}/memory.max")
        assert engines.sh(f"echo {cgroup_file(*files)}") == f"{64 << 20}\n"


@pytest.mark.skipif("runc" in (OTHER_RUNTIME or ""), reason="with runc it is another one's")
def test_restored_container_sees_its_own_cgroup(engines: Engines) -> None:
    counting(engines, "-m", "64m")
    engines.podman("container", "checkpoint", "--export", f"{PLACE}/context/c.tar", "c")
    engines.podman("container", "restore", "--import", f"{PLACE}/context/c.tar", "--name", "d")
    limit = cgroup_file("memory/memory.limit_in_bytes", "memory.max")
    assert engines.podman("exec", "d", "sh", "-c", f"echo {limit}").stdout == f"{64 << 20}\n"


def test_checkpoint_of_a_connection_and_a_terminal(engines: Engines) -> None:
    connection = "sleep 1000 | nc -l -p 7 & until netstat -tln | grep -q :7; do :; done; sleep 1000 | nc 127.0.0.1 7 &"
    options = ("-dt", "--name", "c", "--network", "bridge")
    engines.podman("run", *options, IMAGE, "sh", "-c", f"{connection} {COUNT}")
    netstat = ("exec", "c", "netstat", "-tn")
    while "ESTABLISHED" not in engines.podman(*netstat).stdout:
        pass
    refused = engines.podman("container", "checkpoint", "c", check=False)
    assert refused.returncode != 0
    assert engines.status("c") == "running"
    engines.count("c", engines.logs("c")[-1])
    engines.podman("container", "checkpoint", "--tcp-established", "--file-locks", "c")
    held = engines.logs("c")[-1]
    engines.podman("container", "restore", "--tcp-established", "--file-locks", "c")
    engines.count("c", held)
    numbers = engines.logs("c")
    assert numbers == list(range(1, len(numbers) + 1))
    assert "ESTABLISHED" in engines.podman(*netstat).stdout
    assert engines.podman("exec", "c", "test", "-t", "0", check=False).returncode != 0
    assert engines.podman("exec", "c", "readlink", "/proc/1/fd/0").stdout == "/dev/pts/0\n"


def test_restore_of_what_is_not_there(engines: Engines) -> None:
    counting(engines)
    engines.podman("container", "checkpoint", "--keep", "c")
    bundle = engines.podman("inspect", "-f", "{{.StaticDir}}", "c").stdout.strip()
    engines.sh(f"rm {bundle}/checkpoint/pstree.img")
    done = engines.podman("container", "restore", "c", check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


# Builds


def build(engines: Engines, *lines: str, check: bool = True) -> "tuple[int, str]":
    engines.write(f"{PLACE}/context/Dockerfile", "\n".join(lines) + "\n")
    options = ("--runtime", engines.runtime, "--network", "none", "-t", "localhost/built", f"{PLACE}/context")
    done = engines.podman("build", "-q", "--no-cache", *options, check=check)
    return done.returncode, done.stderr


def test_build(engines: Engines) -> None:
    engines.sh(f"tar -C {PLACE}/rootfs -cf {PLACE}/context/rootfs.tar .")
    build(
        engines,
        "FROM scratch",
        "ADD rootfs.tar /",
        "RUN echo built > /mark && chown 1000:1000 /mark && grep -E '^Cap(Eff|Amb)' /proc/self/status >> /mark",
        "USER 1000",
        'CMD ["sh", "-c", "cat /mark; id -u"]',
    )
    lines = engines.podman("run", "--rm", "localhost/built").stdout.split("\n")
    assert (lines[0], lines[3]) == ("built", "1000")
    assert lines[1] == "CapEff:\t00000000a80425fb"


def test_build_whose_command_fails(engines: Engines) -> None:
    status, said = build(engines, f"FROM {IMAGE}", "RUN exit 3", check=False)
    assert status == 3
    assert "exit status 3" in said


# containerd


def run(containerd: Engines, container: str, *command: str, options: tuple[str, ...] = ()) -> "tuple[int, str, str]":
    done = containerd.ctr("run", "--runc-binary", containerd.runtime, *options, IMAGE, container, *command, check=False)
    return done.returncode, done.stdout, done.stderr


def count(containerd: Engines, container: str) -> int:
    assert run(containerd, container, "sh", "-c", COUNT_IN_FILE, options=("-d",))[0] == 0
    return containerd.count_in_file(container, 3)


def tasks(containerd: Engines) -> list[list[str]]:
    return [[line.split()[0], line.split()[2]] for line in containerd.ctr("task", "ls").stdout.splitlines()[1:]]


def test_containerd_output_and_exit_status(containerd: Engines) -> None:
    script = "echo out; echo err >&2; exit 4"
    assert run(containerd, "c", "sh", "-c", script, options=("--rm",)) == (4, "out\n", "err\n")


def test_containerd_options(containerd: Engines) -> None:
    options = (
        "--rm", "--env", "A=b", "--cwd", "/tmp", "--read-only", "--seccomp", "--mount",
        f"type=bind,src={PLACE}/context,dst=/mnt,options=rbind:ro",
    )  # fmt: skip
    containerd.write(f"{PLACE}/context/file", "x")
    script = "echo $A $(pwd) $(cat /mnt/file); grep Seccomp: /proc/self/status; touch /x"
    status, out, error = run(containerd, "c", "sh", "-c", script, options=options)
    assert (status, out) == (1, "b /tmp x\nSeccomp:\t2\n")
    assert "Read-only file system" in error


def test_containerd_terminal(containerd: Engines) -> None:
    command = ("ctr", "--address", f"{PLACE}/containerd/sock")
    options = ("--rm", "-t", "--runc-binary", containerd.runtime)
    status, out = containerd.on_terminal(*command, "run", *options, IMAGE, "c", "sh", "-c", "tty; exit 6")
    assert (status, out.split()) == (6, ["/dev/pts/0"])
    count(containerd, "d")
    status, out = containerd.on_terminal(
        *command, "task", "exec", "-t", "--exec-id", "e", "d", "sh", "-c", "tty; exit 5"
    )
    assert status == 5
    assert "/dev/pts/0\r" in out


def test_containerd_command_that_cannot_be_run(containerd: Engines) -> None:
    """The shim reads the runtime's JSON log, and shows the last error in it."""
    for command, said in (("nosuch", "not found"), ("/etc/passwd", "permission denied")):
        status, _, error = run(containerd, "c", command, options=("--rm",))
        assert status != 0
        assert "OCI runtime create failed: " in error
        assert command in error
        assert said in error.lower()
    count(containerd, "d")
    done = containerd.ctr("task", "exec", "--exec-id", "e", "d", "nosuch", check=False)
    assert done.returncode != 0
    assert "nosuch" in done.stderr


def test_containerd_task(containerd: Engines) -> None:
    count(containerd, "c")
    assert tasks(containerd) == [["c", "RUNNING"]]
    done = containerd.ctr("task", "exec", "--exec-id", "e", "c", "sh", "-c", "echo out; exit 9", check=False)
    assert (done.returncode, done.stdout) == (9, "out\n")
    assert len(containerd.ctr("task", "ps", "c").stdout.splitlines()) in (2, 3)
    metrics = containerd.ctr("task", "metrics", "--format", "json", "c").stdout
    assert '"pids"' in metrics
    containerd.ctr("task", "pause", "c")
    assert tasks(containerd) == [["c", "PAUSED"]]
    containerd.ctr("task", "resume", "c")
    containerd.count_in_file("c", containerd.count_in_file("c", 0))
    containerd.ctr("task", "kill", "-s", "SIGUSR1", "c")  # nothing: init of a pid namespace, no handler
    assert tasks(containerd) == [["c", "RUNNING"]]
    containerd.ctr("task", "kill", "-s", "SIGKILL", "c")
    while tasks(containerd) != [["c", "STOPPED"]]:
        pass
    done = containerd.ctr("task", "kill", "-s", "SIGKILL", "c", check=False)
    assert "unknown error after kill" not in done.stderr
    assert "exit code 137" in containerd.ctr("task", "delete", "c", check=False).stderr
    assert tasks(containerd) == []
    containerd.ctr("task", "start", "-d", "c")
    containerd.count_in_file("c", 1)
    containerd.ctr("task", "rm", "-f", "c")
    containerd.ctr("container", "rm", "c")


def test_containerd_shim_that_is_killed(containerd: Engines) -> None:
    """Containerd calls `delete --force` then: the container goes with it."""
    count(containerd, "c")
    pid = containerd.ctr("task", "ls").stdout.splitlines()[1].split()[1]
    containerd.sh(
        "for p in /proc/[0-9]*; do cat $p/cmdline 2> /dev/null | tr '\\0' ' ' | "
        "grep -qE '^/usr/bin/containerd-shim.* -id c ' && kill -9 ${p#/proc/}; done",
        check=False,
    )
    while tasks(containerd):
        pass
    while containerd.sh(f"cat /proc/{pid}/comm", check=False) == "sh\n":
        pass  # the task is off the list before containerd calls `delete`


def test_containerd_checkpoint_of_a_task(containerd: Engines) -> None:
    before = count(containerd, "c")
    images = f"{PLACE}/context/images"
    containerd.ctr("task", "checkpoint", "--image-path", images, "--work-path", f"{PLACE}/context/work", "c")
    assert "inventory.img" in containerd.sh(f"ls {images}")
    assert "Dumping finished successfully" in containerd.sh(f"cat {PLACE}/context/work/dump.log")
    assert tasks(containerd) == [["c", "RUNNING"]]
    containerd.count_in_file("c", before)
    containerd.ctr("task", "checkpoint", "--exit", "--image-path", f"{images}2", "--work-path", f"{images}2.work", "c")
    while tasks(containerd) != [["c", "STOPPED"]]:
        pass


def test_containerd_checkpoint_and_restore(containerd: Engines) -> None:
    """The working form of ctr 1.6: an image of the task, the container's image and its files, restored with --live."""
    before = count(containerd, "c")
    containerd.ctr("container", "checkpoint", "--task", "--image", "--rw", "c", "localhost/checkpoint:1")
    name = containerd.ctr("task", "exec", "--exec-id", "e", "c", "cat", "/run-name").stdout
    try:
        after = containerd.count_in_file("c", before)  # it goes on
        containerd.ctr("task", "rm", "-f", "c")
        containerd.ctr("container", "rm", "c")
        containerd.ctr("container", "restore", "--live", "--rw", "c", "localhost/checkpoint:1")
        assert tasks(containerd) == [["c", "RUNNING"]]
        containerd.count_in_file("c", after)
        now = containerd.ctr("task", "exec", "--exec-id", "e", "c", *whole_line("/u")).stdout
        assert now == name, "it began anew"
    finally:
        containerd.ctr("images", "rm", "localhost/checkpoint:1")


# Moves


@pytest.fixture
def moving(engines: Engines) -> Iterator[Callable[[str, str, str], None]]:
    """Move a container, whose state is below a root directory, to a host. What came to host2 does not stay there."""
    if OTHER_RUNTIME is not None:
        pytest.skip("only pymigrate moves containers")
    moved: list[tuple[str, str]] = []

    def move(root: str, container: str, to: str) -> None:
        moved.append((root, container))
        source = "host2" if to == "host1" else "host1"
        engines.hosts.on(source, "pymigrate", "--root", root, "move", "--allow", "seccomp", container, to)

    yield move
    for root, container in moved:
        for host in ("host1", "host2"):
            engines.hosts.on(host, "pymigrate", "--root", root, "delete", "-f", container, check=False)


def test_container_of_podman_moves_there_and_back(engines: Engines, moving: Callable[[str, str, str], None]) -> None:
    """With what podman binds into it, as it sees it. Podman does not start it again, nor end what has come back."""
    file = f"{PLACE}/context/file"
    engines.write(file, "old")
    before = counting(engines, "--read-only", "--hostname", "h", "-v", f"{file}:/file:ro", "--shm-size", "5m")
    engines.podman("exec", "c", "sh", "-c", "echo kept > /dev/shm/x")
    engines.sh(f"printf new > {file}.new && mv {file}.new {file}")
    container = engines.podman("inspect", "-f", "{{.Id}}", "c").stdout.strip()
    there = ("pymigrate", "exec", container, "sh", "-c", "hostname; cat /file /dev/shm/x; df /dev/shm | tail -n 1")
    for host in ("host2", "host1"):
        moving(ROOT, container, host)
        *lines, shm = engines.hosts.on(host, *there).stdout.splitlines()
        assert lines == ["h", "oldkept"]
        assert shm.split()[:2] == ["shm", "5120"]
        refused = engines.podman("start", "c", check=False).stderr
        assert "was moved by pymigrate" in refused
        before = engines.hosts.wait_count(host, before, container)
        assert engines.status("c") == "exited"
    engines.podman("rm", "c")
    engines.hosts.wait_count("host1", before, container)
    engines.hosts.on("host1", "pymigrate", "delete", "-f", container)


def test_container_of_containerd_moves_there_and_back(
    containerd: Engines, moving: Callable[[str, str, str], None]
) -> None:
    """It becomes one of pymigrate's; containerd sees it end, and forgets it without ending what has come back."""
    script = COUNT.replace("echo $i", "echo $i > /run/n")
    assert run(containerd, "c", "sh", "-c", script, options=("-d", "--read-only"))[0] == 0
    before = containerd.count_in_file("c", 3, "/run/n")
    root = "/run/containerd/runc/default"
    moving(root, "c", "host2")
    while tasks(containerd) != [["c", "STOPPED"]]:
        pass
    moving(root, "c", "host1")
    containerd.ctr("task", "delete", "c", check=False)  # its status is that of the container that has ended
    assert tasks(containerd) == []
    there = ("pymigrate", "--root", root)
    assert int(containerd.hosts.on("host1", *there, "exec", "c", *whole_line("/run/n")).stdout) > before
    containerd.hosts.on("host1", *there, "delete", "-f", "c")
