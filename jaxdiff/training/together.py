"""Communication between the hosts of a run, so that none waits for a host that has failed."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.errors import JaxdiffError


class HostError(JaxdiffError, RuntimeError):
    """Another host has failed, for which this one would wait."""


def gather(value: Any) -> list[Any]:
    """The JSON values that the hosts pass in, in the order of their indices. Call it on every host."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every host runs and that all of them leave together.

    Raises:
        HostError: the block raised an error on another host. An error on this host is raised as it is.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    errors = gather(None if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None:
        raise error
    for host, message in enumerate(errors):
        if message is not None:
            raise HostError(f"Process {host} of {len(errors)} has failed: {message}")
