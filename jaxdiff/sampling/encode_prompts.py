"""Prompts encoded by a separate program, so that the text encoders can be freed before images are drawn."""

import functools
from collections.abc import Sequence

import jax

from jaxdiff import mapping, parallel
from jaxdiff.models.model import Model
from jaxdiff.sampling.checks import as_devices
from jaxdiff.sampling.generate import to_compute_dtype
from jaxdiff.sampling.inputs import conditions
from jaxdiff.sampling.resolve import Request
from jaxdiff.typing import Params


@functools.lru_cache(maxsize=64)
def text_encoder(model: Model, clip_skip: int, devices: tuple[jax.Device, ...] | jax.sharding.Mesh) -> mapping.Mapped:
    """The compiled program (params of text encoders, ImageInputs) -> what `conditions` returns."""
    model, cast = to_compute_dtype(model, devices)
    return mapping.pmap(lambda params, inputs: conditions(model, cast(params), inputs, clip_skip), devices, shared=1)


def encode_prompts(
    model: Model, params: Params, request: Request, devices: Sequence[jax.Device] | None = None
) -> Request:
    """The request with its prompts encoded into host arrays: `draw` then needs no parameters of text encoders.

    Args:
        params: parameters of the text encoders; others are not used.
        devices: see `generate`.
    """
    texts = request.images._replace(
        noise=None, image=None, mask=None, noise_level=None, control_images=(), controlnet_scale=()
    )
    static = model, request.settings.clip_skip, as_devices(devices, len(request.prompts), params)
    encoded_prompts = parallel.fetch(text_encoder(*static)(params, texts))
    images = request.images._replace(
        conditions=encoded_prompts, tokens=None, negative=None, blend_tokens=None, blend_negative=None
    )
    return request._replace(images=images)
