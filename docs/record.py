"""Draw the moves of a demo as docs/move.svg: `pymigrate demo | python docs/record.py`."""

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 112  # columns
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich names fonts of a web site: the reader's own will do


def styled(line: str) -> Text:
    """Return a line of the demo in colours: its time dim, its subject bold, bars and results green."""
    text = Text(line[:WIDTH])
    text.highlight_regex(r"^ *[0-9.]+ s", "dim")
    text.highlight_regex(r"(?<= s  )[a-z]+[0-9]?", "bold cyan")
    text.highlight_regex(r"#+$", "green")
    text.highlight_regex(r"pymigrate move.*", "bold")
    text.highlight_regex(r"downtime [0-9.]+ m?s|longest took .*|[0-9]+ keys equal", "bold green")
    return text


def main() -> None:
    console = Console(record=True, width=WIDTH, file=sys.stderr)
    console.print(Text("# pymigrate demo", style="bold"))
    for line in sys.stdin:
        if "snapshot " in line:
            break
        console.print(styled(line.rstrip("\n")), no_wrap=True)
    drawn = _FONT.sub("", console.export_svg(title="pymigrate demo"))
    Path(__file__).with_name("move.svg").write_text("\n".join(map(str.rstrip, drawn.splitlines())) + "\n")


if __name__ == "__main__":
    main()
