"""Parse flags as container engines write them: by the conventions of Go's flag package, which runc uses.

-name and --name are the same, as are --name VALUE and --name=VALUE. A boolean may be written --name=false. Flags may
follow arguments, except where the arguments are a command line themselves (`exec`). argparse has other conventions,
and importing it would cost every verb of the runtime 7 ms.
"""

from __future__ import annotations

from runtime.light.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.errors import UsageError

_TRUE, _FALSE = ("true", "1", "t", "T", "TRUE", "True"), ("false", "0", "f", "F", "FALSE", "False")


class Flag(Record):
    """One flag. `kind` is bool, str, int, or list for a flag that can be repeated; `choices` are its allowed values."""

    name: str
    help: str = ""
    kind: str = "bool"
    short: str = ""
    metavar: str = "VALUE"
    default: Any = None
    choices: tuple[str, ...] = ()

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    def initial(self) -> Any:
        if self.default is not None:
            return self.default
        return {"bool": False, "list": []}.get(self.kind)


class Syntax(Record):
    """The syntax of one verb. The argument "X?" is optional; "X..." takes all remaining words unchanged."""

    text: str
    flags: tuple[Flag, ...] = ()
    arguments: tuple[str, ...] = ()


class Values:
    """The values of a command line, as attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


HELP = Flag("help", "show this help", short="h")


def parse(argv: list[str], syntax: Syntax, program: str) -> Values:
    """Parse the words after a verb. Raises UsageError. `help` is True if help was asked for."""
    values, rest = scan(argv, syntax.flags, program, stop=any(name.endswith("...") for name in syntax.arguments))
    if values.help:
        return values
    for name in syntax.arguments:
        attribute = name.strip("?.")
        if name.endswith("..."):
            values.__dict__[attribute] = rest[1:] if rest[:1] == ["--"] else rest
            rest = []
        elif rest:
            values.__dict__[attribute] = rest.pop(0)
        elif name.endswith("?"):
            values.__dict__[attribute] = None
        else:
            raise usage_error(f"{program}: missing argument {attribute.upper()}", program)
    if rest:
        raise usage_error(f"{program}: too many arguments: {' '.join(rest)}", program)
    return values


def scan(argv: list[str], flags: tuple[Flag, ...], program: str, *, stop: bool) -> tuple[Values, list[str]]:
    """Separate flags from arguments. With `stop` the first argument ends the flags. Raises UsageError."""
    known = {name: flag for flag in (*flags, HELP) for name in (flag.name, flag.short) if name}
    values = {flag.attribute: flag.initial() for flag in (*flags, HELP)}
    left, rest = list(argv), []
    while left:
        word = left.pop(0)
        if word == "--" and not stop:
            rest += left
            break
        if not word.startswith("-") or word == "-":
            rest.append(word)
            if stop:
                rest += left
                break
            continue
        name, equals, value = word.lstrip("-").partition("=")
        flag = known.get(name)
        if flag is None:
            raise usage_error(f"flag provided but not defined: {word.partition('=')[0]}", program)
        if flag.kind == "bool":
            if equals and value not in (*_TRUE, *_FALSE):
                raise usage_error(f"invalid boolean value {value!r} for -{flag.name}", program)
            values[flag.attribute] = value not in _FALSE
            continue
        if not equals:
            if not left:
                raise usage_error(f"flag needs an argument: -{flag.name}", program)
            value = left.pop(0)
        values[flag.attribute] = _convert(flag, value, values[flag.attribute], program)
    return Values(**values), rest


def _convert(flag: Flag, value: str, before: Any, program: str) -> Any:
    if flag.choices and value not in flag.choices:
        raise usage_error(f"--{flag.name} {value}: must be one of {', '.join(flag.choices)}", program)
    if flag.kind == "int":
        try:
            return int(value)
        except ValueError:
            raise usage_error(f"invalid value {value!r} for flag -{flag.name}: must be a number", program) from None
    return [*before, value] if flag.kind == "list" else value


def usage_error(problem: str, program: str) -> UsageError:
    """Return the error of a wrong command line. Verbs without one do not import the class: it takes 0.2 ms."""
    from migrate.errors import UsageError

    return UsageError(problem, remedy=f"see `{program} --help`")


def usage(syntax: Syntax, program: str) -> str:
    """Return the help text of a verb."""
    arguments = " ".join(
        f"[{name.strip('?.').upper()}...]" if name.endswith("...") else
        f"[{name[:-1].upper()}]" if name.endswith("?") else name.upper() for name in syntax.arguments
    )  # fmt: skip
    lines = [f"usage: {program} [options] {arguments}".rstrip(), "", syntax.text, "", "options:"]
    rows = []
    for flag in (*syntax.flags, HELP):
        left = f"-{flag.short}, --{flag.name}" if flag.short else f"    --{flag.name}"
        metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.metavar
        rows.append((left if flag.kind == "bool" else f"{left} {metavar}", flag.help))
    width = min(max(len(left) for left, _ in rows), 34)
    for left, text in rows:
        lines.append(f"  {left:<{width}}  {text}" if len(left) <= width else f"  {left}\n  {'':<{width}}  {text}")
    return "\n".join(lines)
