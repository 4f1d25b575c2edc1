"""A bar on stderr where that is a terminal; nothing in a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar while the block runs.

    Args:
        what: is done, such as "drawing".
        total: how many images there are.

    Yields:
        A function (count, what=None): so many more are done, and from now on something else may be.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    # Paths printed meanwhile pass through the bar's console only if stdout is a terminal, else they belong to a pipe.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as bars:
        task = bars.add_task(what, total=total, speed="")

        def advance(count: int, what: str | None = None) -> None:
            bars.advance(task, count)
            speed = bars.tasks[0].speed
            bars.update(task, description=what, speed=f"{speed:.2f} images/s" if speed else "")

        yield advance
