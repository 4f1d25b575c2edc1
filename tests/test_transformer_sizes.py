"""The published models of the transformer families by the names and shapes of all their tensors; no memory is taken."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

pytest.importorskip("diffusers")
import diffusers
import torch
import transformers

from jaxdiff.config import Flux2VAEConfig, Qwen3Config, T5Config, VAEConfig
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.torch_names import current_name, tensor_name, to_torch_layout
from jaxdiff.io.transformer_layout import COUNTS, as_diffusers, described_transformer
from jaxdiff.models.model import FAMILIES, MODULES, autoencoder
from tests.support.published_transformers import PUBLISHED, TRANSFORMERS
from tests.support.transformer_pipelines import converter, original

NOT_READ = ("lm_head.weight", "num_batches_tracked")  # a language model's head; a count


def inputs(config):
    """The smallest inputs of a network; its parameters do not depend on their sizes."""
    array = jax.ShapeDtypeStruct
    if isinstance(config, T5Config | Qwen3Config):
        return (array((1, 2), np.int32),)
    if isinstance(config, VAEConfig | Flux2VAEConfig):
        return (array((1, 8, 8, 3), np.float32),)
    text = getattr(config, "joint_attention_dim", None) or config.cap_feat_dim
    pooled = getattr(config, "pooled_projection_dim", None)
    sizes = ((1, 2, 2, config.latent_channels), (1,), (1, 2, text), pooled and (1, pooled), None, (1,))
    return tuple(size and array(size, np.float32) for size in sizes)


def ours(published):
    """Shapes by tensors' names, as a file has them."""
    config = published.config.from_dict(published.values)
    build = MODULES.get(published.config, lambda config: autoencoder(config, "float32"))
    shapes = jax.eval_shape(lambda *x: build(config).init(jax.random.key(0), *x)["params"], *inputs(config))
    flat = flatten_dict(shapes).items()
    return {tensor_name(path): to_torch_layout(path, np.broadcast_to(0, x.shape)).shape for path, x in flat}


def theirs(published):
    """PyTorch's tensors by name, without memory."""
    values = dict(published.values)
    with torch.device("meta"):
        if cls := getattr(diffusers, published.config.CLASS_NAME, None):
            return cls(**values).state_dict()
        if "rope_theta" in values:
            values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        cls = getattr(transformers, published.config.CLASS_NAME)
        return cls(cls.config_class(**values)).state_dict()


SLOW = ("FLUX.1-dev", "FLUX.2-klein-9B", "Qwen3-8B", "stable-diffusion-3.5-large")  # of the same kinds as others


def shapes_of(tensors):
    return {name: tuple(x.shape) for name, x in tensors.items()}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in PUBLISHED])
def test_every_tensor_is_pytorchs_and_every_one_of_pytorchs_is_there(name):
    """And in the authors' layout, which PyTorch's converter reads, at the full depth."""
    published = PUBLISHED[name]
    found, tensors = ours(published), theirs(published)
    expected = {current_name(n): shape for n, shape in shapes_of(tensors).items() if not n.endswith(NOT_READ)}
    assert found == expected
    own = {n: np.prod(shape, dtype=np.int64) for n, shape in found.items() if n != "pos_embed.pos_embed"}
    assert sum(own.values()) == published.parameters
    if name not in TRANSFORMERS:
        return
    config = published.config.from_dict(published.values)
    family = FAMILIES[published.config]
    written = original(family, tensors, torch.cat, lambda x: x)
    assert len(written) < len(tensors)
    source = TensorSource("x", {n: list(shape) for n, shape in shapes_of(written).items()}, lambda name: None)
    fewer = {field: 1 for field in COUNTS if hasattr(config, field)}
    assert described_transformer(source, dataclasses.replace(config, **fewer)) == config
    read = as_diffusers(source, family, found)
    assert {n: tuple(shape) for n, shape in read.shapes.items()} == found
    converted = converter(family, 3072)(dict(written))
    assert shapes_of(converted) == shapes_of(tensors)
