"""The live display on a terminal: phase, bytes, rate and elapsed time in one line that is redrawn."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from migrate.events import Event, PassDone, PhaseStarted, Report, Warned
from migrate.events import Progress as ProgressEvent
from migrate.ui import text


class Live:
    """A progress display made with rich; the timeline follows at the end.

    `several`: it names the container, and begins again after the end of a move.
    """

    def __init__(self, *, several: bool = False) -> None:
        self._several = several
        self._console = Console()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[phase]:<14}"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            refresh_per_second=8,
        )
        self._progress.start()
        self._task: TaskID | None = None

    def emit(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                if self._task is not None:
                    self._progress.remove_task(self._task)
                self._progress.start()  # unless it runs
                words = f"{event.id}: {event.text}" if self._several else event.text
                self._task = self._progress.add_task(words, total=None, phase=event.phase)
            case ProgressEvent():
                if self._task is not None:
                    self._progress.update(self._task, completed=event.done, total=event.total)
            case Warned():
                self._console.print(f"[yellow]warning:[/] {event.message}", highlight=False)
            case PassDone():
                self._console.print(f"  {text.one_pass(event)}", highlight=False, markup=False)
            case Report():
                self.close()
                self._show(event)

    def close(self) -> None:
        self._progress.stop()

    def _show(self, report: Report) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2))
        longest = max(report.phases.values(), default=0) or 1
        for name, seconds in report.phases.items():
            table.add_row(name, "━" * max(1, round(30 * seconds / longest)), text.duration(seconds))
        self._console.print(table)
        self._console.print(f"[bold green]{text.summary(report)}", highlight=False)
