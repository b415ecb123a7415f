"""The documentation names every rule, exit code, verb and package of the code, and what it names exists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli import VERBS
from migrate.cli.exit_codes import EXIT_CODES
from migrate.preflight.rules import RULES

TOP = Path(__file__).resolve().parents[2]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:criu_rpc|runtime|migrate|tests|vagrant|docs)/(?:\w[\w.-]*/)*\w[\w.-]*)`")


_NAME = re.compile(r"`((?:criu_rpc|runtime|migrate)/[\w/]+\.py):([\w.]+)`")


def names(path: Path) -> set[str]:
    """The functions, classes, constants and methods that a module defines, methods as Class.method."""
    found = set[str]()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef():
                found.add(node.name)
            case ast.ClassDef():
                found |= {node.name, *(f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef))}
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def rows(page: Path) -> Iterator[list[str]]:
    """The cells of each row of a page's tables."""
    for line in page.read_text().splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_rule_is_documented_with_whether_it_can_be_lifted() -> None:
    found = {
        cells[0].strip("`"): cells[3] == "yes" for cells in rows(TOP / "docs/rules.md") if cells[0].startswith("`")
    }
    assert found == {name: rule.allowable for name, rule in RULES.items()}


def test_rules_named_in_the_readme_exist() -> None:
    section = (TOP / "README.md").read_text().partition("## What cannot be moved")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([a-z-]+)`", section, re.MULTILINE)
    assert len(named) == 10
    assert set(named) <= RULES.keys()


def test_every_exit_code_is_documented_as_the_help_has_it() -> None:
    section = (TOP / "docs/commands.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    found = re.findall(r"^\| ([0-9]+) \| (.*) \|$", section, re.MULTILINE)
    assert found == [(str(code), text) for code, text in EXIT_CODES.values()]


def test_every_verb_is_documented() -> None:
    named = {word for cells in rows(TOP / "docs/commands.md") for word in re.findall(r"`([a-z]+)", cells[0])}
    assert VERBS.keys() <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("https:"):
            continue
        to = page.parent / path if path else page
        assert to.is_file(), link
        assert not anchor or anchor in anchors(to), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in _PATH.findall(page.read_text()):
        assert (TOP / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_that_are_named_exist(page: Path) -> None:
    for path, name in _NAME.findall(page.read_text()):
        assert name in names(TOP / path), f"{path}:{name}"


def test_every_package_is_in_the_architecture() -> None:
    packages = {path.parent.relative_to(TOP).as_posix() for path in TOP.glob("[rm]*/*/__init__.py")}
    assert packages <= set(re.findall(r"`([a-z_/]+)`", (TOP / "docs/architecture.md").read_text()))
