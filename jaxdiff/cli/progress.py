"""A progress bar on stderr if that is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(activity: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar while the block runs.

    Args:
        activity: shown before the bar, such as "drawing".
        total: number of images.

    Yields:
        A function (count, activity=None) that advances the bar by `count` images and may change the activity.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    # If stdout is a terminal, rich must print the paths above the bar; in a pipe they go out unchanged.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as bars:
        task = bars.add_task(activity, total=total, speed="")

        def advance(count: int, activity: str | None = None) -> None:
            bars.advance(task, count)
            speed = bars.tasks[0].speed
            bars.update(task, description=activity, speed=f"{speed:.2f} images/s" if speed else "")

        yield advance
