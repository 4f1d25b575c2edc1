"""Examples that show the same with any model: on the tiny one, in `make test-all` also on the one that they load."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from examples import custom_guidance, image_loss_gradient, vmap_guidance
from jaxdiff.io.images import read_image

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["tiny", pytest.param("icons", marks=pytest.mark.slow)])
def loaded(request, tiny, monkeypatch):
    """What the examples load."""
    if request.param == "icons":
        return jaxdiff.load("icons")
    monkeypatch.setattr(jaxdiff, "load", lambda name: {"icons": tiny}[name])
    return tiny


@pytest.mark.slow
def test_mapped_guidance_draws_what_each_scale_draws_alone(tmp_path, loaded):
    scales, steps = (1.0, 3.0, 8.0), 2
    images = vmap_guidance.main(tmp_path / "a.png", scales=scales, steps=steps, seed=3)
    model, params = loaded
    noise = jaxdiff.initial_noise(jax.random.key(3)[None], (16, 16, model.unet.config.in_channels))
    alone = jaxdiff.generate(
        model,
        params,
        ["an owl"] * 3,
        guidance_scale=scales,
        pag_scale=0,
        steps=steps,
        scheduler="dpmpp_2m",
        noise=np.repeat(noise, 3, 0),
    )
    # Float32 sums in another order move a value by 1e-5 or so, which is one level of 255 where it crosses a border.
    assert np.abs(np.round(255 * images) - alone).max() <= 1
    assert np.abs(images[0] - images[2]).mean() > 0.01
    side = images.shape[1]
    assert read_image(tmp_path / "a.png").shape == (side, 3 * (side + 2) - 2, 3)


@pytest.mark.slow
def test_descent_lowers_the_loss_of_the_image(tmp_path, loaded):
    losses, images = image_loss_gradient.main(tmp_path / "a.png", steps=2, updates=4)
    assert min(losses) < losses[0]
    assert images.shape[0] == len(losses) == 5


@pytest.mark.slow
def test_custom_guidance_that_keeps_all_is_classifier_free(tmp_path, loaded):
    rows = custom_guidance.main(tmp_path / "a.png", prompts=["an owl"], scale=4.0, steps=2, seed=5)
    model, params = loaded
    noise = jaxdiff.initial_noise(jax.random.split(jax.random.key(5), 1), (16, 16, model.unet.config.in_channels))
    settings = {"steps": 2, "scheduler": "dpmpp_2m", "noise": noise, "pag_scale": 0}
    for row, scale in zip(rows, (2.0, 4.0), strict=False):
        image = jaxdiff.generate(model, params, ["an owl"], guidance_scale=scale, **settings)
        assert np.abs(np.round(255 * row) - image).max() <= 1
    assert np.abs(rows[1] - rows[2]).max() > 1e-4  # far more than rounding: 1e-6


TINY = """
import jaxdiff
from tests.support.tiny import tiny_model, tiny_params
model = tiny_model()
jaxdiff.load = lambda name: {"icons": (model, tiny_params(model))}[name]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("loading", "side"), [(TINY, 32), ("", 128)], ids=["tiny", "icons"])
def test_sharded_batch_equals_one_device(tmp_path, loading, side):
    """In a process of its own, whose devices can be simulated."""
    code = """
import numpy as np
from examples import shard_batch
meshed, single = shard_batch.main("a.png", steps=2)
assert len(meshed.sharding.device_set) == 8 and len(single.sharding.device_set) == 1
assert {s.data.shape for s in meshed.addressable_shards} == {(1, SIDE, SIDE, 3)}
np.testing.assert_allclose(np.asarray(meshed), np.asarray(single), atol=1e-4)  # float32 sums in another order
assert np.abs(np.asarray(meshed)[0] - np.asarray(meshed)[1]).mean() > 0.01
"""
    code = loading + code.replace("SIDE", str(side))
    flags = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles faster
    flags = os.environ.get("XLA_FLAGS", "") + flags
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{'rack': 2, 'chip': 4}: [1, 1, 1, 1, 1, 1, 1, 1] images" in done.stdout
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (4 * (side + 2) - 2, 2 * (side + 2) - 2)
