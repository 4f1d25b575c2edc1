"""The example scripts do what they say: what takes the bundled model in `make test-all`, their parts always."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from examples import custom_guidance, custom_scheduler, ddim_inversion, image_loss_gradient
from jaxdiff.io.images import read_image

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_is_short_and_says_command_cost_and_result(script):
    text = script.read_text()
    assert 25 <= len(text.splitlines()) <= 80
    docstring = text.split('"""')[1]
    for part in (f"python examples/{script.name}", "Cost: ", "Expect: "):
        assert part in docstring
    assert script.name in (ROOT / "examples" / "README.md").read_text()


def gaussian_error(scheduler, steps, deviation=0.5):
    """Relative error of a scheduler where the data are Gaussian: the network and the solution are known exactly.

    The posterior mean is alpha s^2 x / v with v = alpha^2 s^2 + sigma^2, and the flow keeps x / sqrt(v).
    """
    sigma = np.geomspace(20, 0.05, steps + 1)  # in sigma / alpha
    alpha = 1 / np.sqrt(1 + sigma**2)
    times = jaxdiff.Time(np.arange(steps + 1.0)[::-1], *(a.astype(np.float32) for a in (alpha, alpha * sigma)))

    def variance(time):
        return time.alpha**2 * deviation**2 + time.sigma**2

    x = jnp.ones((1, 2, 2, 1))
    end = jaxdiff.sample(
        lambda x, time: time.alpha * deviation**2 / variance(time) * x, x, times, scheduler, jax.random.key(0)
    )
    first, last = (jax.tree.map(lambda a, i=i: a[i], times) for i in (0, -1))
    return float(jnp.abs(end / np.sqrt(variance(last) / variance(first)) - 1).max())


def test_custom_scheduler_is_of_second_order():
    errors = {n: gaussian_error(custom_scheduler.deis(), n) for n in (20, 40, 80)}
    assert 3.3 < errors[20] / errors[40] < 4.7  # 4 in the limit; DDIM's error halves
    assert 3.3 < errors[40] / errors[80] < 4.7
    assert errors[40] < gaussian_error(jaxdiff.get_scheduler("ddim"), 40) / 4


@pytest.mark.slow
def test_custom_scheduler_is_nearer_to_the_reference_than_ddim(tmp_path):
    errors = custom_scheduler.main(tmp_path / "a.png", reference_steps=80)
    assert errors["deis"] < 0.6 * errors["ddim"]


def test_projected_guidance_leaves_the_prediction_s_own_direction_alone():
    cond, uncond = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    full = custom_guidance.projected(cond, uncond, 5.0, along=1.0)
    np.testing.assert_allclose(full, uncond + 5 * (cond - uncond), atol=1e-5)
    image = cond - jnp.median(cond, (1, 2), keepdims=True)
    across = custom_guidance.projected(cond, uncond, 5.0) - cond
    # Orthogonal but for float32 rounding, of 1e-7 of the lengths' product.
    assert np.abs((across * image).sum((1, 2, 3))).max() < 1e-4


@pytest.mark.slow
def test_projected_guidance_keeps_contrast_at_a_high_scale(tmp_path):
    mild, burnt, projected = custom_guidance.main(tmp_path / "a.png", prompts=["a castle", "a dog"])
    contrast = [custom_guidance.contrast(row) for row in (mild, burnt, projected)]
    assert contrast[1] > 1.05 * contrast[0]
    assert abs(contrast[2] - contrast[0]) < abs(contrast[1] - contrast[0])
    assert ((projected - mild) ** 2).mean() < ((burnt - mild) ** 2).mean()


@pytest.mark.slow
def test_descent_turns_the_balloon_blue(tmp_path):
    losses, images = image_loss_gradient.main(tmp_path / "a.png", steps=4, updates=9)
    assert min(losses) < 0.5 * losses[0]
    subject = images[[0, -1]].min(-1) < 0.7
    red, _, blue = np.moveaxis(np.stack([im[s].mean(0) for im, s in zip(images[[0, -1]], subject, strict=True)]), 1, 0)
    assert (blue - red)[1] > (blue - red)[0] + 0.4


@pytest.mark.slow
def test_remat_makes_memory_independent_of_the_steps(capsys):
    model, params = jaxdiff.load("icons")
    for steps, remat in ((10, False), (10, True), (50, True)):
        image_loss_gradient.compile_gradient(model, params, "a balloon", steps, remat)
    stored, ten, fifty = (float(line.split(": ")[1].split()[0]) for line in capsys.readouterr().out.splitlines())
    assert ten < stored / 3
    assert fifty < 1.1 * ten


@pytest.mark.slow
def test_inversion_reconstructs_a_given_image(tmp_path):
    images, noise = ddim_inversion.main(tmp_path / "a.png", steps=20)
    given, coded, reconstructed, edited = images
    np.testing.assert_array_equal(np.round(255 * given), read_image(ddim_inversion.APPLE))
    assert ddim_inversion.psnr(reconstructed, coded) > 25
    assert ddim_inversion.psnr(edited, coded) < 15
    assert noise.shape == (1, 16, 16, 8)
