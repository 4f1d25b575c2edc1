"""The base class of the package's errors, errors that several folders raise, and warnings that are logged once.

Each message is one sentence: what is wrong with which file or argument, and how to fix it.
"""

import functools

from absl import logging


@functools.cache
def say_once(warning: str) -> None:
    """Log a warning once per process."""
    logging.warning("%s", warning)


class JaxdiffError(Exception):
    """Base class of the package's own errors."""


class ArgumentError(JaxdiffError, ValueError):
    """A wrong argument: one sentence that begins with its name, for which a command puts its flag."""

    def __init__(self, argument: str, reason: str):
        super().__init__(argument, reason)
        self.argument, self.reason = argument, reason

    def __str__(self) -> str:
        return f"{self.argument} {self.reason}"


class WeightsError(JaxdiffError, ValueError):
    """Weights that are missing, unreadable, or do not fit the model's configuration."""


class ImageError(JaxdiffError, ValueError):
    """An image that is missing, unreadable, or cannot be written."""
