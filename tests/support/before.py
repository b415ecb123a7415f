"""pymigrate as it was at an earlier commit, installed in a directory where the present code then replaces it."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.hosts import PYMIGRATE

COMMIT = "7bf4addb68d42ab6de5ee925b11d7939160be360"  # the last one before the modules moved into packages by subject
PACKAGES = ("criu_rpc", "migrate", "runtime")
_TOP = Path(__file__).resolve().parents[2]


class Installed:
    """The old code in `directory`, with a launcher, until `upgrade` puts the present code in its place.

    Replacing the files matters: a monitor that the old code started loads some modules only when it needs them.
    """

    def __init__(self, directory: Path) -> None:
        """Skip the test where the commit is missing, as in a shallow clone or an unpacked archive."""
        self.tree = directory / "pymigrate-before"
        self.command = str(directory / "bin/pymigrate")
        self.tree.mkdir()
        archive = directory / "before.tar"
        # Git refuses the clone of another user unless it is told not to.
        git = ["git", "-c", f"safe.directory={_TOP}", "-C", str(_TOP)]
        command = [*git, "archive", "--output", str(archive), COMMIT, *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"the commit {COMMIT[:7]} is not in this checkout: {done.stderr.strip()}")
        with tarfile.open(archive) as packed:
            packed.extractall(self.tree)  # our own commit: no filter needed, and Python 3.11.2 has none
        launcher = Path(PYMIGRATE[0]).read_text()
        assert f'"{_TOP}"' in launcher
        Path(self.command).parent.mkdir()
        with open(os.open(self.command, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755), "w") as file:
            file.write(launcher.replace(f'"{_TOP}"', f'"{self.tree}"'))

    def program(self, text: str) -> str:
        """Return a Python program that runs `text` with the code that is installed."""
        return f"import sys\nsys.path.insert(0, {str(self.tree)!r})\n{text}"

    def upgrade(self) -> None:
        for package in PACKAGES:
            shutil.rmtree(self.tree / package)
            shutil.copytree(_TOP / package, self.tree / package)
