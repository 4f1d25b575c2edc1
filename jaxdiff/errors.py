"""Errors that more than one part of the package raises."""


class ArgumentError(ValueError):
    """An argument that cannot be right: one sentence that begins with its name, so that a command can name its flag."""

    def __init__(self, argument: str, reason: str):
        super().__init__(argument, reason)
        self.argument, self.reason = argument, reason

    def __str__(self) -> str:
        return f"{self.argument} {self.reason}"
