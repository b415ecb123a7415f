"""The tree that criu_rpc/errors.py draws is the tree of the classes, kinds included."""

import re

import migrate.errors
import runtime.errors
from criu_rpc import errors
from criu_rpc.errors import Error

_LINE = re.compile(r"^((?:\|   |    )*(?:\+-- )?)(\w+)(?: \(([\w-]+)\))?(?:  |$)")


def drawn() -> list[tuple[str, str, str]]:
    """(class, base, kind) of each line; a line without a kind has its base's."""
    found: list[tuple[str, str, str]] = []
    above = [("Exception", "failure")]
    tree = (errors.__doc__ or "").split("\n\n")[1]
    for line in tree.splitlines():
        match = _LINE.match(line)
        assert match is not None, line
        depth = len(match[1]) // 4
        base, inherited = above[depth]
        kind = match[3] or inherited
        above[depth + 1 :] = [(match[2], kind)]
        found.append((match[2], base, kind))
    return found


def test_the_drawn_tree_is_that_of_the_classes() -> None:
    modules = (errors, runtime.errors, migrate.errors)
    classes = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Error)
    }
    assert sorted(drawn()) == sorted((name, of.__bases__[0].__name__, of.kind) for name, of in classes.items())
