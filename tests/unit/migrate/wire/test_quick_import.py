"""paramiko is imported with a stand-in for one module of the standard library, which must not stay."""

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[4]


def run(code: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP, check=True)
    return done.stdout


def test_paramiko_knows_its_version_and_the_real_module_can_be_imported() -> None:
    code = "import sys; from migrate.wire.quick_import import import_paramiko; import_paramiko()\n"
    code += "print('importlib.metadata' in sys.modules, 'paramiko' in sys.modules); import paramiko\n"
    code += "from importlib import metadata; print(metadata.version('paramiko') == paramiko.__version__)\n"
    code += "print(metadata.files('paramiko') is not None)"
    assert run(code).split() == ["False", "True", "True", "True"]


def test_without_a_version_beside_it_nothing_is_imported() -> None:
    code = "import sys; from migrate.wire import quick_import; quick_import._version = lambda: ''\n"
    code += "quick_import.import_paramiko(); print('importlib.metadata' in sys.modules, 'paramiko' in sys.modules)"
    assert run(code).split() == ["False", "False"]
