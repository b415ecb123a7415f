"""What a move needs that takes 30 to 50 ms to start: it starts while the target is asked, and changes no container."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from migrate.files import tmpfs
from migrate.files.tmpfs import View
from migrate.memory.injector import Injector
from migrate.model import MigrationMode
from runtime.spec.config import Spec
from runtime.state.record import State


class Early:
    """A context manager: leaving it ends everything that was not taken."""

    def __init__(self, state: State, spec: Spec, mode: MigrationMode) -> None:
        """Raises OSError."""
        self.injector = None if mode is MigrationMode.STOP_AND_COPY else Injector()
        pool = ThreadPoolExecutor(1, "views")
        self._views: Future[list[View]] | None = pool.submit(tmpfs.views, state, spec)
        pool.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take_views(self) -> list[View]:
        """Return views of the tmpfs mounts that are worth sending ahead; the caller closes them. Raises OSError."""
        views, self._views = self._views, None
        assert views is not None
        return views.result()

    def close(self) -> None:
        """End what was not taken. May be repeated."""
        views, self._views = self._views, None
        if views is not None:
            views.add_done_callback(_close)
        if self.injector is not None:
            self.injector.close()


def _close(views: "Future[list[View]]") -> None:
    if views.exception() is None:
        for view in views.result():
            view.close()
