"""The base class of the package's own errors, and those that several of its folders raise.

The message of each is one sentence: what is wrong with which file or argument, and how to mend it.
"""


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
