"""pymigrate with an attacker beside it, who acts at exact points: what a race would hit now and then."""

import os
import subprocess
import sys
from pathlib import Path

import runtime
from tests.system.conftest import Local

# Goes on in every process of ours, those that a fresh interpreter is started for included.
_AGAIN = """
import os, sys
sys.path.insert(0, {base!r})
from runtime.linux import selfexec, syscalls
def _command(module, *args, _before=selfexec.command):
    argv = _before(module, *args)
    place = argv.index("-c") + 1
    argv[place] = "import os; exec(os.environ['ATTACK']); " + argv[place]
    return argv
selfexec.command = _command
def outside(act):
    # In the test's mount namespace: a directory where something is mounted cannot be renamed in one's own.
    pid = os.fork()
    if not pid:
        try:
            syscalls.setns(os.open("/proc/{pid}/ns/mnt", os.O_RDONLY), syscalls.CLONE_NEWNS)
            act()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
{attack}
"""
_RUN = "import os; exec(os.environ['ATTACK']); from migrate.cli import main; sys.exit(main(sys.argv[1:]))"


def attacked(pymigrate: Local, attack: str, *argv: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a verb in which `attack`, Python text, has replaced functions; `outside(f)` calls one on the host."""
    base = str(Path(runtime.__file__).parent.parent)
    text = _AGAIN.format(base=base, pid=os.getpid(), attack=attack)
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "--root", pymigrate.root, *map(str, argv)], capture_output=True, text=True,
        env={**os.environ, "ATTACK": text}, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done
