"""The base class of the package's own errors, those that several of its folders raise, and warnings logged once.

The message of each is one sentence: what is wrong with which file or argument, and how to mend it.
"""

import functools

from absl import logging


@functools.cache
def say_once(warning: str) -> None:
    """Log a warning once in a process, however often its cause is met."""
    logging.warning("%s", warning)


class JaxdiffError(Exception):
    """Base class of the package's own errors."""


class ArgumentError(JaxdiffError, ValueError):
    """An argument that cannot be right: one sentence that begins with its name, so that a command can name its flag."""

    def __init__(self, argument: str, reason: str):
        super().__init__(argument, reason)
        self.argument, self.reason = argument, reason

    def __str__(self) -> str:
        return f"{self.argument} {self.reason}"


class WeightsError(JaxdiffError, ValueError):
    """Weights that are missing, unreadable, or do not fit the model's configuration."""


class ImageError(JaxdiffError, ValueError):
    """An image that is missing, unreadable, or cannot be written."""
