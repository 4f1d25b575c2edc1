"""What the hosts of a run tell each other, so that none waits for one that has failed."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdiff.errors import JaxdiffError


class HostError(JaxdiffError, RuntimeError):
    """Another host has failed, which this one would wait for."""


def gather(value: Any) -> list[Any]:
    """What each host passed in, as JSON holds it, by the number of the host. Call it on every host."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded))]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that every host runs, and which all of them leave at the same time.

    Raises:
        HostError: the block raised an error on another host; where it did on this one, that error.
    """
    error = None
    try:
        yield
    except Exception as e:
        error = e
    said = gather(None if error is None else " ".join(str(error).split()) or type(error).__name__)
    if error is not None:
        raise error
    for host, text in enumerate(said):
        if text is not None:
            raise HostError(f"Process {host} of {len(said)} has failed: {text}")
