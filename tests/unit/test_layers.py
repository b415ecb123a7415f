"""The arrows of the architecture: criu_rpc <- runtime <- migrate, and who may import the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
MODULES = [path for package in ("criu_rpc", "runtime", "migrate") for path in sorted((TOP / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FORBIDDEN = {"criu_rpc": ("runtime", "migrate"), "runtime": ("migrate",), "migrate": ()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(TOP).as_posix())
def test_imports_point_the_right_way(path: Path) -> None:
    name = path.relative_to(TOP).as_posix()
    for imported in imports(path):
        package = imported.partition(".")[0]
        assert package not in FORBIDDEN[name.partition("/")[0]], f"{name} imports {imported}"
        if package == "rich":
            assert name.startswith("migrate/ui/"), f"{name} imports rich"
        if package == "paramiko":
            assert name.startswith("migrate/wire/"), f"{name} imports paramiko"
        if package == "jeepney":
            assert name == "runtime/cgroups/dbus.py", f"{name} imports jeepney"
        if package == "pyroute2":
            assert name == "runtime/network/netlink.py", f"{name} imports pyroute2"
        if imported.startswith("migrate.commands"):
            assert name.startswith(("migrate/commands/", "migrate/cli")), f"{name} imports {imported}"
        if package in ("ctypes", "_ctypes"):
            assert name in ("runtime/light/ctypes.py", "runtime/seccomp/libseccomp.py"), f"{name} imports ctypes"


HOT = (
    "argparse", "contextlib", "ctypes", "dataclasses", "enum", "functools", "json", "pathlib", "re", "socket",
    "struct", "subprocess",
)  # fmt: skip


@pytest.mark.parametrize("verb", ["create", "start", "state", "delete", "kill", "run"])
def test_verbs_that_engines_call_import_next_to_nothing(verb: str) -> None:
    """Each of these costs milliseconds in every life of a container (see `make bench`)."""
    code = (
        f"import sys; sys.path.insert(0, {str(TOP)!r}); from migrate.cli import main;"
        f"main([{verb!r}, 'no-such-container'] + ['9'] * ({verb!r} == 'kill'));"
        "import runtime.lifecycle.control, runtime.lifecycle.start, runtime.lifecycle.create;"
        "import runtime.cgroups.limits, runtime.cgroups.v1;"
        f"print([name for name in {HOT!r} if name in sys.modules])"
    )
    done = subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_short_verb_pays_for_nothing_heavy() -> None:
    heavy = {"paramiko", "rich", "google.protobuf", "cryptography", "jeepney", "pyroute2"}
    code = (
        "import sys; from migrate.cli import main; main(['state', 'no-such-container']);"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TOP)
    assert done.stdout.strip() == "[]"


def test_shim_and_init_need_no_site_packages() -> None:
    names = "runtime.monitor.main, runtime.init.container, runtime.init.exec, runtime.checkpoint.criu_launcher"
    names += ", migrate.files.rsh, migrate.files.no_follow, migrate.lab.host_init"
    code = f"import sys; sys.path.insert(0, {str(TOP)!r}); import {names}"
    subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", code], check=True)
