"""Images enlarged by the model's upscaler, with few programs and a bound."""

from collections.abc import Callable

import numpy as np

from jaxdiff.errors import ArgumentError
from jaxdiff.models.model import Model
from jaxdiff.sampling.upscale import largest_scale, upscale
from jaxdiff.serving.requests import EnlargeRequest
from jaxdiff.typing import Params

UNIT = 64  # pixels: sides are padded to multiples of it


def check_enlarging(model: Model, height: int, width: int, scale: float, pixels: int) -> None:
    """Raise ArgumentError for an image that cannot be enlarged by the factor `scale`.

    Args:
        pixels: limit for the image that the network produces.
    """
    if model.upscaler is None:
        raise ArgumentError("upscaler", "is missing: this server was started without one.")
    if height * width * largest_scale(model.upscaler, scale) ** 2 > pixels:
        raise ArgumentError(
            "image", f"of {width}x{height} pixels would have more than {pixels} pixels: send a smaller one."
        )


def enlarge(model: Model, params: Params, request: EnlargeRequest, before_tile: Callable[[], None]) -> np.ndarray:
    """The image enlarged by the model's upscaler.

    It is padded by reflection, and the result cropped, so that all sizes share few programs.
    """
    assert model.upscaler is not None
    height, width = request.image.shape[:2]
    padded = np.pad(request.image, ((0, -height % UNIT), (0, -width % UNIT), (0, 0)), "symmetric")
    enlarged = upscale(model.upscaler, params["upscaler"], padded, scale=request.scale, before_tile=before_tile)
    return enlarged[: max(1, round(request.scale * height)), : max(1, round(request.scale * width))]
