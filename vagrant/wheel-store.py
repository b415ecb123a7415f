"""wheel-store.py PYPROJECT PYTHON DIRECTORY: download all wheels that this project needs under another Python.

The Python of a checkout's .venv runs it; pip fetches the wheels as it is configured here. PYTHON is a version ("3.13").
"""

import subprocess
import sys
import tomllib
from pathlib import Path

# glibc of Debian 12 is 2.36; the packages in question are built for these.
_PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def main() -> int:
    pyproject, python, directory = sys.argv[1:]
    project = tomllib.loads(Path(pyproject).read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    platforms = [argument for name in _PLATFORMS for argument in ("--platform", name)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary", ":all:",
         "--python-version", python, *platforms, "--dest", directory, *wanted],
    ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
