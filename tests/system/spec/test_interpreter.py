"""/proc/self/exe: whatever a container does, the interpreter that the runtime runs under stays as it was.

pymigrate runs under a copy of the interpreter here, so that a failing test leaves the machine as it was.
"""

import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import runtime
from runtime.linux import selfexec
from tests.support.boxes import PATIENCE, make, wait_for
from tests.support.hosts import ABLE
from tests.system.conftest import Local

MARK = b"# overwritten"
# Tries to write to the program of every process that is not its own kind, for as long as the test lasts.
WATCH = """
echo ready > /state
while ! [ -e /stop ]; do
  for exe in /proc/[0-9]*/exe; do
    case $(readlink $exe) in *busybox*|"") continue;; esac
    echo seen $exe >> /seen
    (echo '# overwritten' >> $exe) 2>/dev/null && echo wrote >> /wrote
    (exec 9<$exe && sh /hold) 2>/dev/null &
  done
done
"""
HOLD = """
for i in 1 2 3 4 5 6 7 8; do
  echo '# overwritten' >> /proc/self/fd/9 && echo wrote >> /wrote
  usleep 20000
done
"""

# Holds the interpreter open, and becomes another program once it is told to.
OUTLIVE = """
import os
os.dup2(os.open('/proc/self/exe', os.O_RDONLY), 9)
open('/go').read()
os.execv('/bin/sh', ['sh', '/hold'])
"""


def give_python(rootfs: Path) -> None:
    """What the interpreter needs to run inside: it cannot attack from where it does not start."""
    said = subprocess.run(["ldd", os.path.realpath(sys.executable)], capture_output=True, text=True, check=True).stdout
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in [word for word in said.split() if word.startswith("/")]:
        target = rootfs / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target)
    inside = rootfs / str(stdlib).lstrip("/")
    inside.mkdir(parents=True)
    for name in ("encodings", "codecs.py", "io.py", "abc.py", "os.py", "stat.py", "posixpath.py", "genericpath.py",
                 "_collections_abc.py", "site.py", "_sitebuiltins.py"):  # fmt: skip
        copy = shutil.copytree if (stdlib / name).is_dir() else shutil.copy2
        copy(stdlib / name, inside / name)


def end(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)


class Copy:
    """pymigrate under an interpreter of its own."""

    def __init__(self, directory: Path, root: Path) -> None:
        self.python = directory / "python3"
        shutil.copy2(os.path.realpath(sys.executable), self.python)
        self.root = root
        base = Path(runtime.__file__).parent.parent
        self.program = f"import sys; sys.path.insert(0, {str(base)!r}); from migrate.cli import main; "
        self.program += "sys.exit(main(sys.argv[1:]))"
        self._before = self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.python.read_bytes()).hexdigest()

    def __call__(self, *argv: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
        done = subprocess.run(
            [self.python, "-c", self.program, "--root", self.root, *map(str, argv)], capture_output=True, text=True,
            env=environment, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    def is_untouched(self) -> bool:
        return self._digest() == self._before


@pytest.fixture
def copy(pymigrate: Local, tmp_path: Path) -> Copy:
    return Copy(tmp_path, pymigrate.root)


def test_the_copy_is_what_runs(copy: Copy) -> None:
    """Or the other tests would say nothing."""
    with copy.python.open("ab") as file:
        file.write(MARK)
    assert not copy.is_untouched()
    done = subprocess.run([copy.python, "-c", "import os; print(os.readlink('/proc/self/exe'))"], capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONHOME": sys.base_prefix})  # fmt: skip
    assert done.stdout.strip() == str(copy.python)


def test_program_is_proc_self_exe(copy: Copy, tmp_path: Path) -> None:
    for number, program in enumerate(("/proc/self/exe", "/proc/thread-self/exe", "/link", "/script")):
        script = "for i in 1 2 3 4 5; do echo '# overwritten' >> /proc/self/exe; done"
        bundle = make(tmp_path / f"b{number}", "", {"process.args": [program, "-c", script]})
        give_python(bundle / "rootfs")
        (bundle / "rootfs/link").symlink_to("/proc/self/exe")
        (bundle / "rootfs/script").write_text("#!/proc/self/exe\n")
        (bundle / "rootfs/script").chmod(0o755)
        copy("run", "-b", bundle, "c", check=False)
        assert copy.is_untouched(), program


def test_a_program_that_outlives_its_monitor_cannot_write_it(copy: Copy, tmp_path: Path) -> None:
    """While the monitor runs the same file the kernel refuses to write to it; nothing else may depend on that."""
    bundle = make(tmp_path / "b", "", {"process.args": ["/script"]})
    give_python(bundle / "rootfs")
    (bundle / "rootfs/script").write_text("#!/proc/self/exe\n" + OUTLIVE)
    (bundle / "rootfs/script").chmod(0o755)
    (bundle / "rootfs/hold").write_text(HOLD + "touch /done\n")
    os.mkfifo(bundle / "rootfs/go")
    copy("run", "-d", "-b", bundle, "c")
    with open(bundle / "rootfs/go", "w") as go:  # it is open when the script holds the interpreter
        end(json.loads((copy.root / "c/state.json").read_text())["monitor_pid"])
        go.write("go")
    wait_for(bundle / "rootfs/done", lines=0)
    copy("delete", "--force", "c")
    assert copy.is_untouched()
    assert not (bundle / "rootfs/wrote").exists()


def test_the_launchers_interpreter_is_sealed_by_the_first_container(copy: Copy, tmp_path: Path) -> None:
    """Later ones start as fast as without. In a mount namespace of the test's own: it covers this machine's place."""
    place, argv = selfexec.PLACE, [f"{selfexec.PLACE}/python3", "-c"]
    verb = shlex.join(
        [*argv, copy.program, "--root", str(copy.root), "run", "-b", str(make(tmp_path / "b", "true")), "c"]
    )
    asked = "from runtime.linux import selfexec; print(selfexec.is_sealed())"
    ask = shlex.join([*argv, copy.program.replace("from migrate.cli import main; sys.exit(main(sys.argv[1:]))", asked)])
    script = f"""
        set -e; mount -t tmpfs tmpfs {Path(place).parent}; mkdir {place}; ln -s {copy.python} {place}/python3
        before=$(grep -c {place} /proc/self/mounts || true)
        {ask}; {verb}; {ask}; {verb}; echo $(($(grep -c {place} /proc/self/mounts) - before))
        echo '{MARK.decode()}' 2>/dev/null >> {place}/python3 || echo refused
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env={**os.environ, "PYTHONHOME": sys.base_prefix}, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True", "1", "refused"]


def test_exec_of_proc_self_exe(copy: Copy, tmp_path: Path) -> None:
    """A process inside watches for the interpreter, holds it open, and writes to it as soon as nobody runs it."""
    bundle = make(tmp_path / "b", WATCH, {"process.capabilities": ABLE})
    (bundle / "rootfs/hold").write_text(HOLD)
    give_python(bundle / "rootfs")
    (bundle / "rootfs/script").write_text("#!/proc/self/exe\n")
    (bundle / "rootfs/script").chmod(0o755)
    copy("run", "-d", "-b", bundle, "c")
    wait_for(bundle / "rootfs/state")
    # The monitor runs the same file, which the kernel protects as long as somebody does. An engine that is the monitor
    # itself does not.
    end(json.loads((copy.root / "c/state.json").read_text())["monitor_pid"])
    for _ in range(4):
        for program in ("/proc/self/exe", "/script", "true"):
            done = copy("exec", "c", program, "-c", "import time; time.sleep(0.1); print('ran')", check=False)
            assert program != "/proc/self/exe" or done.stdout == "ran\n", done
    (bundle / "rootfs/stop").touch()
    copy("delete", "--force", "c")
    assert copy.is_untouched()
    assert not (bundle / "rootfs/wrote").exists()


def test_a_restore_is_sealed_too(copy: Copy, tmp_path: Path) -> None:
    """CRIU is started by it inside the container's cgroup, and its monitor stays."""
    bundle, images = make(tmp_path / "b", "sleep 1000"), ["--image-path", tmp_path / "images"]
    copy("run", "-d", "-b", bundle, "c")
    copy("checkpoint", *images, "c")
    copy("restore", "-d", "-b", bundle, *images, "c")
    exe = f"/proc/{json.loads((copy.root / 'c/state.json').read_text())['monitor_pid']}/exe"
    assert (os.path.samefile(exe, copy.python), bool(os.statvfs(exe).f_flag & os.ST_RDONLY)) == (True, True)
    copy("delete", "--force", "c")


# What podman's conmon does: it adopts the container, and runs another program.
ENGINE = """
import subprocess, sys
sys.path.insert(0, {base!r})
from runtime.linux import syscalls
syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
{call}
"""


def test_under_an_engine_nobody_runs_the_interpreter(copy: Copy, tmp_path: Path) -> None:
    """Nobody's running it protects it: the container keeps it open until its own program is another one."""
    script = "import os; os.dup2(os.open('/proc/self/exe', os.O_RDONLY), 9); os.execv('/bin/sh', ['sh', '/hold'])"
    bundle = make(tmp_path / "b", "", {"process.args": ["/proc/self/exe", "-c", script]})
    give_python(bundle / "rootfs")
    (bundle / "rootfs/hold").write_text(HOLD + "touch /done\n")
    base = str(Path(runtime.__file__).parent.parent)
    create = ["create", "-b", str(bundle), "--pid-file", str(tmp_path / "pid"), "c"]
    argv = [str(copy.python), "-c", copy.program, "--root", str(copy.root)]
    call = f"for verb in {[create, ['start', 'c']]!r}: subprocess.run([*{argv!r}, *verb], check=True)"
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    subprocess.run([sys.executable, "-c", ENGINE.format(base=base, call=call)], check=True, env=environment)
    assert json.loads((copy.root / "c/state.json").read_text())["monitor_pid"] == 0
    wait_for(bundle / "rootfs/done", lines=0)
    assert copy.is_untouched()
    assert not (bundle / "rootfs/wrote").exists()


def test_create_hook_of_the_container_cannot_write_it(copy: Copy, tmp_path: Path) -> None:
    """startContainer hooks run in the container's root as children of the interpreter."""
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "echo '# overwritten' >> /proc/$PPID/exe; echo '#' >> /proc/1/exe"]}
    bundle = make(tmp_path / "b", "true", {"hooks": {"startContainer": [hook]}})
    copy("run", "-b", bundle, "c", check=False)
    assert copy.is_untouched()


def test_libraries_of_the_image_are_not_ours(copy: Copy, tmp_path: Path) -> None:
    """Modules that an image has in the interpreter's places are never imported."""
    bundle = make(tmp_path / "b", "echo ran", {"hooks": {"startContainer": [{"path": "/bin/true"}]}})
    trap = "raise SystemExit(open('/trapped', 'w').write('x'))\n"
    for place in {*map(Path, sys.path), Path("/usr/lib/python3.11"), Path("/usr/lib/python3.11/encodings")}:
        if place.is_absolute() and not place.suffix:
            (bundle / "rootfs" / str(place).lstrip("/")).mkdir(parents=True, exist_ok=True)
            for name in (
                "os",
                "subprocess",
                "json",
                "ctypes",
                "encodings",
                "aliases",
                "utf_8",
                "signal",
                "socket",
                "fcntl",
            ):
                (bundle / "rootfs" / str(place).lstrip("/") / f"{name}.py").write_text(trap)
    assert copy("run", "-b", bundle, "c").stdout == "ran\n"
    bundle2 = make(tmp_path / "d", "sleep 60")
    shutil.copytree(bundle / "rootfs/usr", bundle2 / "rootfs/usr", dirs_exist_ok=True)
    copy("run", "-d", "-b", bundle2, "d")
    copy("exec", "d", "true")
    copy("delete", "-f", "d")
    assert list(tmp_path.glob("*/rootfs/trapped")) == []
