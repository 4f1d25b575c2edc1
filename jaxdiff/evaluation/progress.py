"""A bar on stderr where that is a terminal; nothing in a pipe."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """A context manager; `advance(count)` says that so many more are done.

    Args:
        what: is done, such as "drawing".
        total: how many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False)
        self._task = self._bars.add_task(what, total=total, speed="")

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, count: int) -> None:
        self._bars.advance(self._task, count)
        speed = self._bars.tasks[0].speed
        self._bars.update(self._task, speed=f"{speed:.2f} images/s" if speed else "")
