"""config.json, process: who the program is, what it may do, and what it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.linux import syscalls
from runtime.linux.capabilities import NUMBERS
from runtime.linux.files import number_list
from tests.support.boxes import Fields, listener, make, output, refusal, run
from tests.support.hosts import PYMIGRATE
from tests.support.pybox import write_python_bundle
from tests.system.conftest import Local

NOBODY: Fields = {"process.user": {"uid": 65534, "gid": 65534}}
FDS = "ls -l /proc/self/fd | sed -n 's/.* \\([0-9]*\\) -> /\\1 /p'"


def status(text: str, name: str) -> str:
    return next(line.split(None, 1)[1] for line in text.splitlines() if line.startswith(f"{name}:"))


def test_user_groups_and_umask(pymigrate: Local, tmp_path: Path) -> None:
    user = {"uid": 7, "gid": 8, "additionalGids": [9, 10], "umask": 0o27}
    said = output(pymigrate, tmp_path, "id -u; id -g; id -G; umask; touch /tmp/x; stat -c %a,%u,%g /tmp/x",
                  {"process.user": user})  # fmt: skip
    assert said.splitlines() == ["7", "8", "8 9 10", "0027", "640,7,8"]


def test_groups_of_the_caller_are_not_the_containers(pymigrate: Local, tmp_path: Path) -> None:
    assert output(pymigrate, tmp_path, "id -G", extra_groups=[27, 100]) == "0\n"


def test_home_comes_from_the_containers_users(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "echo $HOME", {"process.user.uid": 12})
    (bundle / "rootfs/etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nme:x:12:12::/home/me:/bin/sh\n")
    assert pymigrate("run", "-b", bundle, "c").stdout == "/home/me\n"
    assert output(pymigrate, tmp_path, "echo $HOME", {"process.env+": ["HOME=/x"]}) == "/x\n"
    assert output(pymigrate, tmp_path, "echo $HOME", {"process.user.uid": 13}) == "/\n"


def test_environment_is_what_the_bundle_says(pymigrate: Local, tmp_path: Path) -> None:
    said = output(pymigrate, tmp_path, "env", {"process.env": ["PATH=/bin", "A=0", "A=b=c", "E="]},
                  env={**os.environ, "LEAK": "1"})  # fmt: skip
    assert set(said.splitlines()) - {"SHLVL=1", "PWD=/"} == {"PATH=/bin", "A=b=c", "E=", "HOME=/root"}


def test_cwd(pymigrate: Local, tmp_path: Path) -> None:
    assert output(pymigrate, tmp_path, "pwd; stat -c %a,%u .", {"process.cwd": "/new/place"}) == "/new/place\n755,0\n"
    assert "process.cwd" in refusal(pymigrate, tmp_path, {"process.cwd": "/bin/busybox"})


def test_cwd_by_a_descriptor_never_leads_outside(pymigrate: Local, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    for path in (*(f"/proc/self/fd/{fd}" for fd in range(3, 8)), "/proc/self/cwd", "/proc/1/root"):
        done = run(pymigrate, tmp_path, "pwd; ls; ls ..", {"process.cwd": path}, cwd=tmp_path)
        assert done.returncode == 0 or "process.cwd" in done.stderr, path
        assert "secret" not in done.stdout, path


def test_cwd_by_a_preserved_descriptor_of_the_host_is_refused(pymigrate: Local, counting: Path, tmp_path: Path) -> None:
    """A descriptor that the caller hands on is the program's, but no way to the host for us."""
    pymigrate("run", "-d", "-b", counting, "c")
    bundle = make(tmp_path / "b", "pwd; ls", {"process.cwd": "/proc/self/fd/3"})
    for argv in (("run", "-b", bundle, "d"), ("exec", "--cwd", "/proc/self/fd/3", "c", "ls")):
        script = f'exec 3< {tmp_path}; exec "$@"'
        command = ["bash", "-c", script, "bash", *PYMIGRATE, "--root", pymigrate.root, argv[0], "--preserve-fds", "1"]
        done = subprocess.run([*map(str, (*command, *argv[1:]))], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (255 if argv[0] == "exec" else 1, "")
        assert "process.cwd: /proc/self/fd/3: is outside the container" in done.stderr


def test_cwd_of_a_host_descriptor_is_refused_in_exec(pymigrate: Local, counting: Path) -> None:
    pymigrate("run", "-d", "-b", counting, "c")
    for fd in range(3, 8):
        root = os.open("/", os.O_PATH)
        done = pymigrate("exec", "--cwd", f"/proc/self/fd/{fd}", "c", "ls", check=False, pass_fds=[root])
        os.close(root)
        assert done.returncode != 0, fd
        assert "process.cwd" in done.stderr


@pytest.mark.parametrize("script", ["./tool", "../bin/tool"])
def test_relative_program_is_found_from_cwd(pymigrate: Local, tmp_path: Path, script: str) -> None:
    bundle = make(tmp_path / "b", "", {"process.cwd": "/bin", "process.args": [script]})
    (bundle / "rootfs/bin/tool").write_text("#!/bin/sh\necho tool\n")
    (bundle / "rootfs/bin/tool").chmod(0o755)
    assert pymigrate("run", "-b", bundle, "c").stdout == "tool\n"


def test_program_that_the_user_may_not_run(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "", {"process.args": ["/bin/tool"], **NOBODY})
    (bundle / "rootfs/bin/tool").write_text("#!/bin/sh\n")
    (bundle / "rootfs/bin/tool").chmod(0o700)
    done = pymigrate("run", "-b", bundle, "c", check=False)
    assert (done.returncode, "process.args[0]" in done.stderr, "permission denied" in done.stderr) == (1, True, True)


def test_capabilities_of_root(pymigrate: Local, tmp_path: Path) -> None:
    two = ["CAP_KILL", "CAP_CHOWN"]
    sets = {"bounding": two, "effective": ["CAP_KILL"], "permitted": two, "inheritable": [], "ambient": []}
    # Root's exec makes permitted what is bounding, and effective all of it (capabilities(7)).
    text = output(pymigrate, tmp_path, "cat /proc/self/status", {"process.capabilities": sets})
    assert [status(text, f"Cap{name}") for name in ("Bnd", "Prm", "Inh", "Amb")] == [
        f"{0x21:016x}", f"{0x21:016x}", f"{0:016x}", f"{0:016x}",
    ]  # fmt: skip


def test_capabilities_of_another_user(pymigrate: Local, tmp_path: Path) -> None:
    one = ["CAP_NET_BIND_SERVICE"]
    everywhere = dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), one)
    text = output(pymigrate, tmp_path, "cat /proc/self/status", {"process.capabilities": everywhere, **NOBODY})
    assert [status(text, f"Cap{name}") for name in ("Prm", "Eff", "Inh", "Amb")] == [f"{1 << 10:016x}"] * 4
    # Ambient must be inheritable too (capabilities(7)): without that it is left out, as the specification wants it.
    text = output(pymigrate, tmp_path, "cat /proc/self/status",
                  {"process.capabilities": everywhere | {"inheritable": []}, **NOBODY})  # fmt: skip
    assert [status(text, f"Cap{name}") for name in ("Prm", "Eff", "Amb", "Bnd")] == [
        f"{0:016x}", f"{0:016x}", f"{0:016x}", f"{1 << 10:016x}",
    ]  # fmt: skip


def test_capabilities_that_cannot_be_given_are_warned_of(pymigrate: Local, counting: Path, tmp_path: Path) -> None:
    """By name, whether the kernel does not know them or we lack them; the rest is given."""
    held = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "CapPrm" in line)[8:], 16)
    lacking = [name for name, number in NUMBERS.items() if not held >> number & 1]
    wanted = {key: ["CAP_MAGIC", "CAP_KILL", *lacking] for key in ("bounding", "effective", "permitted")}
    log = tmp_path / "log"
    bundle = make(tmp_path / "b", "grep CapEff /proc/self/status", {"process.capabilities": wanted})
    done = pymigrate("--log", log, "--log-format", "json", "run", "-b", bundle, "c")
    assert (done.returncode, status(done.stdout, "CapEff")) == (0, f"{1 << 5:016x}")
    names = ", ".join(sorted(["CAP_MAGIC", *lacking]))
    words = f"process.capabilities: left out, because this host lacks them: {names}"
    assert done.stderr == f"pymigrate: warning: {words}\n"
    assert [(entry["level"], entry["msg"]) for entry in map(json.loads, log.read_text().splitlines())] == [
        ("warning", words)
    ]
    pymigrate("run", "-d", "-b", counting, "c")
    process = {"args": ["true"], "cwd": "/", "capabilities": wanted}
    (tmp_path / "process").write_text(json.dumps(process))
    assert words in pymigrate("exec", "--process", tmp_path / "process", "c").stderr


def held(text: str) -> set[str]:
    """The capabilities of a /proc/PID/status, each of the five sets."""
    return {status(text, f"Cap{name}") for name in ("Bnd", "Prm", "Eff", "Inh", "Amb")}


@pytest.mark.parametrize("user", [{}, NOBODY], ids=["root", "another"])
def test_no_capabilities_field_gives_none(pymigrate: Local, tmp_path: Path, user: dict[str, object]) -> None:
    """As with runc; what `exec` starts has those of the container unless it is told otherwise."""
    fields = {"process.capabilities": None, "process.noNewPrivileges": False, **user}
    assert held(output(pymigrate, tmp_path, "cat /proc/self/status", fields)) == {f"{0:016x}"}
    pymigrate("run", "-d", "-b", make(tmp_path / "exec", "sleep 1000", fields), "c")
    assert held(pymigrate("exec", "c", "cat", "/proc/self/status").stdout) == {f"{0:016x}"}
    (tmp_path / "process").write_text(json.dumps({"args": ["cat", "/proc/self/status"], "cwd": "/"}))
    assert held(pymigrate("exec", "--process", tmp_path / "process", "c").stdout) == {f"{0:016x}"}
    text = pymigrate("exec", "--cap", "CAP_KILL", "c", "cat", "/proc/self/status").stdout
    assert status(text, "CapBnd") == f"{1 << 5:016x}"


def test_what_a_process_file_leaves_open_is_the_containers(pymigrate: Local, tmp_path: Path) -> None:
    fields = {
        "process.rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}], "process.oomScoreAdj": 321,
        "process.user": {"uid": 0, "gid": 0, "umask": 0o27},
    }  # fmt: skip
    pymigrate("run", "-d", "-b", make(tmp_path / "b", "sleep 1000", fields), "c")
    script = "cat /proc/self/status /proc/self/oom_score_adj; ulimit -n; umask"
    (tmp_path / "process").write_text(json.dumps({"args": ["sh", "-c", script], "cwd": "/"}))
    text = pymigrate("exec", "--process", tmp_path / "process", "c").stdout
    assert status(text, "CapBnd") == f"{1 << 29 | 1 << 5 | 1 << 10:016x}"  # those of `spec`
    assert text.splitlines()[-3:] == ["321", "77", "0027"]


def test_an_open_umask_of_the_caller_is_not_the_containers(pymigrate: Local, tmp_path: Path) -> None:
    """Services have 0 as often as not. One that is narrower than runc's 022 stays."""
    for caller, inside in ((0, "0022"), (0o77, "0077")):
        bundle = make(tmp_path / str(caller), "umask; sleep 1000")
        umask = {"preexec_fn": lambda caller=caller: os.umask(caller) and None}
        pymigrate("run", "-d", "-b", bundle, f"c{caller}", **umask)
        assert pymigrate("exec", f"c{caller}", "sh", "-c", "umask", **umask).stdout == f"{inside}\n"
        assert pymigrate("logs", f"c{caller}").stdout == f"{inside}\n"


def test_exec_does_not_hand_on_the_callers_session_keyring(pymigrate: Local, tmp_path: Path) -> None:
    """It may hold what unlocks the caller's files and tickets."""
    keyring = "import ctypes; print(ctypes.CDLL(None).syscall({}, 0, -3, 0))"  # KEYCTL_GET_KEYRING_ID, of the session
    write_python_bundle(tmp_path / "b", "import time; time.sleep(1000)")
    name = f"keys-{os.getpid()}"  # others may have a container of any other one
    pymigrate("run", "-d", "-b", tmp_path / "b", name)
    number = syscalls._number("keyctl")
    code = "from runtime.linux import syscalls; syscalls.join_session_keyring('callers'); import subprocess, sys; "
    code += f"{keyring.format(number)}; sys.stdout.flush(); subprocess.run(sys.argv[1:], check=True)"
    argv = pymigrate.argv("exec", name, "python3", "-ISc", keyring.format(number))
    done = subprocess.run([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True, check=True)
    callers, inside = map(int, done.stdout.split())
    assert (callers > 0, inside > 0, inside != callers) == (True, True, True)


@pytest.mark.parametrize("value", [True, False])
def test_no_new_privileges(pymigrate: Local, tmp_path: Path, value: bool) -> None:
    text = output(pymigrate, tmp_path, "cat /proc/self/status", {"process.noNewPrivileges": value})
    assert status(text, "NoNewPrivs") == str(int(value))


def test_rlimits(pymigrate: Local, tmp_path: Path) -> None:
    limits = [{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 5}]
    text = output(pymigrate, tmp_path, "cat /proc/self/limits", {"process.rlimits": limits})
    rows = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()}
    assert (rows["Max open files"], rows["Max core file size"]) == (["100", "200"], ["0", "5"])


def test_rlimit_that_we_may_not_raise_is_refused(pymigrate: Local, tmp_path: Path) -> None:
    done = run(pymigrate, tmp_path, "ulimit -Hn", {"process.rlimits": [
        {"type": "RLIMIT_NOFILE", "soft": 2**30, "hard": 2**30}]})  # fmt: skip
    assert done.returncode == 1
    assert "process.rlimits: cannot set RLIMIT_NOFILE" in done.stderr


def test_oom_score(pymigrate: Local, tmp_path: Path) -> None:
    assert output(pymigrate, tmp_path, "cat /proc/self/oom_score_adj", {"process.oomScoreAdj": 321}) == "321\n"


@pytest.mark.parametrize(
    ("scheduler", "policy", "priority"),
    [
        ({"policy": "SCHED_BATCH", "nice": 7}, "3", "127"),
        ({"policy": "SCHED_IDLE"}, "5", "120"),
        ({"policy": "SCHED_OTHER", "nice": -5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, "0", "115"),
    ],
)  # fmt: skip
def test_scheduler(pymigrate: Local, tmp_path: Path, scheduler: Fields, policy: str, priority: str) -> None:
    text = output(pymigrate, tmp_path, "read -r _ < /dev/null; cat /proc/1/sched", {"process.scheduler": scheduler})
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in text.splitlines()}
    assert (found["policy"], found["prio"]) == (policy, priority)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"policy": "SCHED_FIFO", "priority": 3},
        {"policy": "SCHED_RR", "priority": 1, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        {"policy": "SCHED_DEADLINE", "runtime": 10**7, "deadline": 10**8, "period": 10**8},
    ],
)
def test_real_time_scheduler_is_set_or_refused(pymigrate: Local, tmp_path: Path, scheduler: Fields) -> None:
    # A cgroup of version 1 without real-time budget takes no such process.
    done = run(pymigrate, tmp_path, "while read -r n v; do case $n in policy) echo $v;; esac; done < /proc/1/sched",
               {"process.scheduler": scheduler})  # fmt: skip
    number = {"SCHED_FIFO": "1", "SCHED_RR": "2", "SCHED_DEADLINE": "6"}[scheduler["policy"]]
    if done.returncode:
        assert "process.scheduler: cannot be set" in done.stderr
    else:
        assert done.stdout.split() == [":", number]


def test_processors_of_exec(pymigrate: Local, tmp_path: Path) -> None:
    """`final` holds for what is exec'ed, `initial` until it is in the container's cgroup; init has all."""
    processors = sorted(os.sched_getaffinity(0))
    last = str(processors[-1])
    script = "grep Cpus_allowed_list /proc/self/status; while :; do sleep 0.05; done"
    affinity = {"initial": str(processors[0]), "final": last}
    bundle = make(tmp_path / "b", script, {"process.execCPUAffinity": affinity})
    pymigrate("run", "-d", "-b", bundle, "c")
    assert status(pymigrate("exec", "c", "cat", "/proc/self/status").stdout, "Cpus_allowed_list") == last
    while not (logged := pymigrate("logs", "c").stdout):
        pass
    assert number_list(status(logged, "Cpus_allowed_list")) == processors
    (tmp_path / "p").write_text(json.dumps({"args": ["true"], "cwd": "/", "execCPUAffinity": {"initial": "8191"}}))
    done = pymigrate("exec", "--process", tmp_path / "p", "c", check=False)
    assert "process.execCPUAffinity.initial: cannot be set: Invalid argument" in done.stderr


def test_io_priority(pymigrate: Local, tmp_path: Path) -> None:
    said = output(pymigrate, tmp_path, "ionice -p 1", {
        "process.ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 6}})  # fmt: skip
    assert said.strip() == "best-effort: prio 6"


@pytest.mark.parametrize("field", ["process.apparmorProfile", "process.selinuxLabel", "linux.mountLabel"])
def test_labels_that_this_kernel_does_not_know_are_refused(pymigrate: Local, tmp_path: Path, field: str) -> None:
    module = "apparmor" if "apparmor" in field else "selinux"
    if Path("/sys/kernel/security/lsm").exists() and module in Path("/sys/kernel/security/lsm").read_text():
        pytest.skip(f"this kernel runs {module}")
    assert f"config.json: {field}: this kernel does not run" in refusal(pymigrate, tmp_path, {field: "some_label"})


def test_unconfined_is_no_label(pymigrate: Local, tmp_path: Path) -> None:
    assert output(pymigrate, tmp_path, "echo ok", {"process.apparmorProfile": "unconfined"}) == "ok\n"


def test_labels_in_exec_are_refused(pymigrate: Local, counting: Path) -> None:
    pymigrate("run", "-d", "-b", counting, "c")
    for flag, value, field in (
        ("--apparmor", "p", "process.apparmorProfile"), ("--process-label", "a:b:c", "process.selinuxLabel"),
    ):  # fmt: skip
        done = pymigrate("exec", flag, value, "c", "true", check=False)
        assert (done.returncode != 0, field in done.stderr) == (True, True), done


def test_stdin_of_run(pymigrate: Local, tmp_path: Path) -> None:
    assert output(pymigrate, tmp_path, "cat; echo end", input="a\nb\n", stdin=None) == "a\nb\nend\n"


def test_session_keyring(pymigrate: Local, tmp_path: Path) -> None:
    # The keys that root may see, those of other containers among them.
    bundle = make(tmp_path / "b", "cat /proc/keys", {"linux.maskedPaths": []})
    own, none = f"keys-{os.getpid()}", f"no-keys-{os.getpid()}"
    assert f" _ses.{own}: " in pymigrate("run", "-b", bundle, own).stdout
    assert f" _ses.{none}: " not in pymigrate("run", "-b", bundle, "--no-new-keyring", none).stdout


def test_pidfd_socket(pymigrate: Local, tmp_path: Path, counting: Path) -> None:
    with listener(tmp_path / "pidfd") as agent:
        pymigrate("create", "-b", counting, "--pidfd-socket", agent.path, "c")
        _, fd = agent.receive()
        assert f"Pid:\t{pymigrate.state('c')['pid']}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text()
        os.close(fd)
        pymigrate("start", "c")
        pymigrate("exec", "-d", "--pidfd-socket", agent.path, "--pid-file", tmp_path / "pid", "c",
                  "sh", "-c", "exec sleep 60 >/dev/null 2>&1")  # fmt: skip
        _, fd = agent.receive()
        assert f"Pid:\t{(tmp_path / 'pid').read_text()}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text()
        os.close(fd)
