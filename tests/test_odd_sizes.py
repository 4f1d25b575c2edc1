"""Images whose sides are any multiple of 8 pixels: latents that do not halve evenly at every level of the UNet."""

import jax
import numpy as np
import pytest

from jaxdiff.config import UNetConfig
from jaxdiff.models.unet import UNet2DConditionModel
from tests.support import networks
from tests.support.comparison import TOLERANCE, drawn, error

FOUR_LEVELS = networks.SMALL_UNET | {  # as Stable Diffusion has: the lowest is an eighth of the latents
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from tests.support import oracle

    return oracle.drawn(diffusers.UNet2DConditionModel(**FOUR_LEVELS))


# Odd at each level; and, in long runs, at the second, at the third, many positions, a single one, and square.
@pytest.mark.parametrize(
    "shape",
    [(7, 17), *(pytest.param(s, marks=pytest.mark.slow) for s in [(10, 14), (12, 20), (33, 35), (1, 1), (9, 9)])],
    ids=str,
)
def test_unet_of_odd_sizes_equals_pytorch(theirs, shape):
    from tests.support.oracle import run_unet

    module = UNet2DConditionModel(UNetConfig.from_dict(FOUR_LEVELS))
    inputs = networks.unet_inputs(FOUR_LEVELS)
    inputs["x"] = np.random.default_rng(2).standard_normal((2, *shape, 4)).astype(np.float32)
    args = tuple(inputs[n] for n in ("x", "t", "embeddings"))
    ours = jax.jit(module.apply)(drawn(module, args), *args)
    assert error(ours, run_unet(theirs, inputs)["output"]) < TOLERANCE
