"""How a command ends: its exit code, and one sentence on stderr if something went wrong."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from jaxdiff import stores
from jaxdiff.config import ConfigError
from jaxdiff.errors import ImageError, JaxdiffError, WeightsError


class UsageError(JaxdiffError):
    """Wrong flags or settings: one sentence that names them and says what to do."""


class Failure(JaxdiffError):
    """A failure that is not a fault of the flags, in one sentence."""


@contextlib.contextmanager
def file_errors(flag: str) -> Iterator[None]:
    """Turn errors of a file into errors of the flag that names it."""
    try:
        yield
    except (ConfigError, ImageError, WeightsError) as e:
        raise UsageError(f"{flag}: {e}") from None


def message(error: BaseException, smaller: str) -> str:
    """An error in one sentence; `smaller` says what to lower when memory is short."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"Memory is too small: {smaller}."
    if isinstance(error, JaxdiffError | ValueError | FloatingPointError):  # already one sentence
        return text
    return f"{type(error).__name__}: {text}; --verbose shows where."


def run(name: str, argv: list[str], command: Callable[[list[str]], int | None], *, smaller: str, stopped: str) -> int:
    """Run a command on its arguments.

    Args:
        name: of the program, before each line on stderr.
        argv: the command line.
        command: returns an exit code, None for 0, or raises any exception.
        smaller: what to lower when memory is short.
        stopped: what to tell a user who stopped it.

    Returns:
        The exit code: the command's; 2 for a UsageError; 130 after Ctrl-C; 1 for any other failure. With --verbose
        among the arguments the traceback is shown.
    """
    try:
        return command(argv) or 0
    except KeyboardInterrupt:
        print(f"{name}: stopped; {stopped}.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # stdout was closed, as by `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if any(a.lstrip("-") == "verbose" for a in argv[1:]):
            logging.exception("traceback")
        print(f"{name}: error: {stores.shown(message(e, smaller))}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def main(
    name: str,
    argv: list[str],
    doc: str | None,
    parse: Callable[[list[str]], Any],
    command: Callable[[Any], None],
    *,
    smaller: str,
    stopped: str,
) -> int:
    """Run a command line, or show its help: `doc` and the flags. `command` gets the result of `parse`; see `run`."""
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s")

    def parse_and_run(argv: list[str]) -> None:
        f = parse(argv)
        if f.help:
            print(doc, f.get_help(), sep="\n")
        else:
            command(f)

    return run(name, argv, parse_and_run, smaller=smaller, stopped=stopped)
