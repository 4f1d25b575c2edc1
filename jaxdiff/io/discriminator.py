"""Weights of patch discriminators in taming-transformers' format."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from jaxdiff.io.tensor_files import load_tensors, open_tensors, without_prefix
from jaxdiff.typing import Params

PREFIX = "loss.discriminator."  # in an autoencoder's checkpoint
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # unused in training


def load_patches(path: str | Path, target: Params) -> Params:
    """The parameters of a `PatchDiscriminator`, from its own file or an autoencoder's checkpoint.

    Args:
        path: a file in any format that `open_tensors` reads.
        target: the expected tree, of arrays or shapes.

    Raises:
        WeightsError: as `load_tensors`.
    """
    source = open_tensors(path)
    if any(name.startswith(PREFIX) for name in source.shapes):
        source = without_prefix(source, PREFIX)
    shapes = {name: shape for name, shape in source.shapes.items() if not name.endswith(BUFFERS)}
    return load_tensors(dataclasses.replace(source, shapes=shapes), target, jnp.float32)
