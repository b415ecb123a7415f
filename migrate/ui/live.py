"""The live display on a terminal: phase, bytes, rate and elapsed time in a line that is redrawn.

Under it, while memory is sent in rounds: what is left, how fast the program writes, and the gap to expect.
"""

from rich.console import Console, Group
from rich.live import Live as Redrawn
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from migrate.events import Event, ModeChosen, PassDone, PhaseStarted, Planned, Report, RoundDone, Throttled, Warned
from migrate.events import Progress as ProgressEvent
from migrate.ui import text


class _Bytes(ProgressColumn):
    """What has been sent, what is left, and how fast it goes."""

    def render(self, task: Task) -> Text:
        return Text(text.progress(task.completed, task.total, task.speed or 0.0), style="cyan")


class Live:
    """A progress display made with rich; the timeline follows at the end.

    `several`: it names the containers, has a line for each, and begins again after the end of a move.
    """

    def __init__(self, *, several: bool = False, console: Console | None = None) -> None:
        self._several = several
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[phase]:<14}"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            _Bytes(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._detail = Text(style="dim", no_wrap=True, overflow="ellipsis")
        self._screen = Redrawn(
            Group(self._progress, self._detail), console=self._console, transient=True, refresh_per_second=8
        )
        self._screen.start()
        self._tasks: dict[str, TaskID] = {}  # by move

    def emit(self, event: Event) -> None:
        name = f"{event.id}: " if self._several else ""
        match event:
            case PhaseStarted():
                self._begin(event)
            case ProgressEvent():
                if event.migration not in self._tasks:
                    self._begin(PhaseStarted(event.phase, "", id=event.id, migration=event.migration))
                self._progress.update(self._tasks[event.migration], completed=event.done, total=event.total)
            case Warned():
                self._print(f"warning: {name}{event.message}", style="yellow")
            case PassDone():
                self._print(f"  {name}{text.one_pass(event)}")
            case ModeChosen():
                self._print(f"  {name}{text.mode(event)}")
            case RoundDone():
                self._print(f"  {name}{text.one_round(event)}")
                self._detail.plain = text.outlook(event)
            case Throttled():
                self._print(f"  {text.throttled(event)}")
            case Planned():
                self.close()
                for line in text.plan(event):
                    self._print(line)
            case Report():
                self.close()
                self._show(event)

    def close(self) -> None:
        self._screen.stop()
        for migration in list(self._tasks):
            self._progress.remove_task(self._tasks.pop(migration))

    def _begin(self, event: PhaseStarted) -> None:
        if (task := self._tasks.pop(event.migration, None)) is not None:
            self._progress.remove_task(task)
        words = f"{event.id}: {event.text}" if self._several else event.text
        self._tasks[event.migration] = self._progress.add_task(words, total=None, phase=event.phase)
        self._detail.plain = ""
        self._screen.start()  # unless it is there already

    def _print(self, line: str, style: str | None = None) -> None:
        """Print a line above the display. Messages quote the other host, so brackets do not count as markup."""
        self._console.print(line, style=style, highlight=False, markup=False)

    def _show(self, report: Report) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2))
        longest = max(report.phases.values(), default=0) or 1
        for name, seconds in report.phases.items():
            table.add_row(name, "━" * max(1, round(30 * seconds / longest)), text.duration(seconds))
        self._console.print(table)
        self._print(text.summary(report), style="bold green")
