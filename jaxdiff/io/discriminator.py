"""Weights of patch discriminators, as taming-transformers writes them."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from jaxdiff.io.tensor_files import load_tensors, open_tensors
from jaxdiff.typing import Params

PREFIX = "loss.discriminator."  # in the checkpoint of an autoencoder, which holds its discriminator
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # which only evaluation reads, and training never


def load_patches(path: str | Path, target: Params) -> Params:
    """The parameters of a `PatchDiscriminator`, out of a file of its own or an autoencoder's checkpoint.

    Args:
        path: a file of any format that `open_tensors` knows.
        target: the tree expected, arrays or shapes.

    Raises:
        WeightsError: as `load_tensors`.
    """
    source = open_tensors(path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in source.shapes) else ""
    kept = [name for name in source.shapes if name.startswith(prefix) and not name.endswith(BUFFERS)]
    shapes = {name.removeprefix(prefix): source.shapes[name] for name in kept}
    alone = dataclasses.replace(source, shapes=shapes, read=lambda name: source.read(prefix + name))
    return load_tensors(alone, target, jnp.float32)
