"""Which package may import which, and who may import the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
PATHS = [path for package in ("criu_rpc", "runtime", "migrate") for path in sorted((TOP / package).rglob("*.py"))]

# The floors, lowest first. A package imports from lower floors only: never from above, nor from its own floor.
FLOORS = """
criu_rpc
runtime.errors      runtime.light       runtime.paths       runtime.limits
runtime.notices
runtime.linux       runtime.sync
runtime.spec
runtime.seccomp     runtime.network     runtime.cgroups
runtime.state
runtime.init        runtime.monitor
runtime.freeze      runtime.typeahead
runtime.lifecycle
runtime.checkpoint
migrate.errors      migrate.phases      migrate.events      migrate.interrupts  migrate.relaunch    migrate.faults
migrate.model       migrate.paths       migrate.disk        migrate.limits      migrate.ui
migrate.files       migrate.journal     migrate.lab         migrate.memory
migrate.wire
migrate.preflight
migrate.source      migrate.target      migrate.snapshots
migrate.cli         migrate.demo
migrate.commands
"""
FLOOR = {package: number for number, row in enumerate(FLOORS.split("\n")) for package in row.split()}


def module(path: Path) -> str:
    return ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in PATHS}


def package(name: str) -> str:
    """Return the row entry of FLOORS that a module belongs to."""
    parts = name.split(".")
    return parts[0] if parts[0] == "criu_rpc" else ".".join(parts[:2])


def imports(path: Path) -> Iterator[str]:
    """Yield every name that a module imports, also late ones; not those that only the type checker sees."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    """Yield the modules of the project that a module imports."""
    for name in imports(path):
        found = name if name in MODULES else name.rpartition(".")[0]
        if found in MODULES:
            yield found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    here = package(name)
    if name in ("runtime", "migrate"):  # they only hold a docstring and the version
        assert list(own_imports(MODULES[name])) == []
        return
    for imported in own_imports(MODULES[name]):
        there = package(imported)
        if there == here or there == "migrate":
            continue
        assert FLOOR[there] < FLOOR[here], f"{name} imports {imported}"


def test_there_are_no_circles_of_modules() -> None:
    """One that imports late counts too: what imports each other is one module in two files."""
    arrows = {name: set(own_imports(path)) - {name} for name, path in MODULES.items()}
    while True:  # take away what imports nothing, again and again: circles stay
        ends = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        if not ends:
            break
        arrows = {name: targets for name, targets in arrows.items() if name not in ends}
    assert arrows == {}


def test_every_package_has_its_floor() -> None:
    """A name in the table that nothing has would hide that a package has been renamed."""
    names = {package(name) for name in MODULES} - {"runtime", "migrate"}
    assert names <= FLOOR.keys()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(TOP).as_posix())
def test_libraries_are_imported_where_they_belong(path: Path) -> None:
    name = path.relative_to(TOP).as_posix()
    for imported in imports(path):
        library = imported.partition(".")[0]
        if library == "rich":
            assert name.startswith("migrate/ui/"), f"{name} imports rich"
        if library == "paramiko":
            assert name.startswith("migrate/wire/"), f"{name} imports paramiko"
        if library == "jeepney":
            assert name == "runtime/cgroups/dbus.py", f"{name} imports jeepney"
        if library == "pyroute2":
            assert name == "runtime/network/netlink.py", f"{name} imports pyroute2"
        if imported.startswith("migrate.commands"):
            assert name.startswith(("migrate/commands/", "migrate/cli")), f"{name} imports {imported}"
        if library in ("ctypes", "_ctypes"):
            allowed = name in ("runtime/light/ctypes.py", "runtime/seccomp/libseccomp.py")
            assert allowed or name.startswith(("migrate/memory/", "migrate/wire/")), f"{name} imports ctypes"


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
