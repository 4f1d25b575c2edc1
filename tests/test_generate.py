"""`generate` and the pure pieces: reproducible images, no needless compilation, gradients and transformations."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.diffusion.spacing import SPACINGS
from jaxdiff.sampling.checks import as_devices
from jaxdiff.sampling.generate import check_finite
from jaxdiff.sampling.noise import image_keys
from tests.support.comparison import levels
from tests.support.tiny import LATENT, SIDE, tiny_controlnet, tiny_model

PROMPTS = ["a castle", "a red dragon", "a blue house"]
STEPS = 3
# The same image drawn in a batch of another size, on another number of devices or by another compiled program differs
# by the order of float32 sums, 1e-6 or so: at most a pixel that falls on the border of two levels changes, by one.
LEVEL = 1


@pytest.fixture(scope="module")
def draw(tiny):
    return functools.partial(jaxdiff.generate, *tiny, steps=STEPS)


@pytest.fixture(scope="module")
def three(draw):
    """Three images of seeds 7, 8 and 9."""
    return draw(PROMPTS, seed=7)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def test_images_are_bytes_and_depend_on_everything(draw, three):
    assert three.shape == (3, SIDE, SIDE, 3)
    assert three.dtype == np.uint8
    assert three.std() > 20  # an image, not a plane
    np.testing.assert_array_equal(draw(PROMPTS, seed=7), three)
    for other in (
        draw(PROMPTS, seed=[17, 18, 19]),
        draw(["a house"] * 3, seed=7),
        draw(PROMPTS, "blurry", seed=7),
        draw(PROMPTS, seed=7, guidance_scale=3.0),
        draw(PROMPTS, seed=7, spacing="trailing"),
    ):
        for before, after in zip(three, other, strict=True):
            assert levels(before, after) > 10


def test_an_image_is_the_same_alone_and_in_a_batch(draw, three):
    alone = np.concatenate([draw(prompt, seed=7 + i) for i, prompt in enumerate(PROMPTS)])
    assert levels(alone, three) <= LEVEL
    assert levels(draw(PROMPTS[::-1], seed=[9, 8, 7])[::-1], three) <= LEVEL


def test_settings_of_each_image(draw, three):
    """Negative prompts and guidance scales given one an image; a scale of 1 has no use for the negative prompt."""
    mixed = draw(PROMPTS, ["", "", "blurry"], seed=7, guidance_scale=[7.5, 1.0, 7.5])
    assert levels(mixed[0], three[0]) <= LEVEL
    plain = draw(PROMPTS, "blurry", seed=7, guidance_scale=1.0)
    assert levels(mixed[1], plain[1]) <= LEVEL
    assert levels(mixed[2], three[2]) > 10


def test_noise_may_be_given(draw, three):
    noise = jaxdiff.initial_noise(image_keys(7, 3), LATENT)
    np.testing.assert_array_equal(draw(PROMPTS, seed=0, noise=noise), three)


def test_initial_noise_is_unit_gaussian():
    """Mean 0 and variance 1 within four standard errors, n^-1/2 and (2/n)^1/2; no value shared between images."""
    noise = np.concatenate([jaxdiff.initial_noise(image_keys(3 * i, 3), LATENT) for i in range(20)]).astype(np.float64)
    assert abs(noise.mean()) < 4 * noise.size**-0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_nothing_compiles_for_other_prompts_seeds_scales_noise_or_spacing(draw, three, compilations):
    noise = np.random.default_rng(0).standard_normal((3, *LATENT))
    draw(PROMPTS, seed=7)
    compilations.clear()
    draw(["(x:1.3)", "y", "a [house]"], "((blurry))", seed=[5, 2, 2**32 - 1], guidance_scale=[2.0, 3.0, 4.5])
    draw(PROMPTS, seed=3, guidance_scale=12.0, noise=noise)
    drawn = [draw(PROMPTS, seed=3, spacing=spacing) for spacing in SPACINGS]
    assert compilations == []
    assert min(images.std() for images in drawn) > 20
    assert len({images.tobytes() for images in drawn}) == len(SPACINGS)


@pytest.mark.slow
def test_nothing_compiles_for_another_number_of_steps(draw, image, compilations):
    drawn = [draw("a castle", steps=1)]
    draw("a [castle|dragon]", image=image, steps=5)
    compilations.clear()
    drawn += [draw("a castle", steps=steps) for steps in (2, 7, 50)]
    draw("a [castle|dragon]", image=image, steps=9)
    assert compilations == []
    assert len({images.tobytes() for images in drawn}) == 4


@pytest.mark.slow
def test_nothing_compiles_for_another_strength_or_image(draw, image, compilations):
    draw("a castle", image=image, strength=1.0)
    compilations.clear()
    for strength in (0.4, 0.7):
        draw("a red dragon", image=255 - image, strength=strength, seed=5)
    assert compilations == []


def test_strength_is_how_far_an_image_is_left(tiny, draw, image):
    """The fewer steps, the closer to what the autoencoder makes of the image; all steps start from noise alone."""
    model, params = tiny
    kept = jax.jit(lambda x: jaxdiff.decode(model, params, jaxdiff.encode(model, params, x)))(image[None] / 255)
    distance = {s: np.abs(draw("a castle", image=image, strength=s)[0] / 255.0 - kept[0]).mean() for s in (0.34, 1.0)}
    assert distance[0.34] < 0.5 * distance[1.0]
    assert (
        levels(draw("a castle", image=image / 255.0, strength=0.34), draw("a castle", image=image, strength=0.34)) == 0
    )


@pytest.mark.slow
def test_frames_lead_to_the_image(draw):
    """Euler's grid ends in a clean sample, which is the last prediction itself."""
    drawn, frames = draw(PROMPTS[:2], scheduler="euler", frames=2)
    assert frames.shape == (2, 2, SIDE, SIDE, 3)
    assert levels(frames[:, -1], drawn) <= LEVEL
    assert levels(frames[:, 0], drawn) > 10


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps 0 must be a whole number of at least 1"),
        ({"steps": 4.0}, "steps 4.0 must be a whole number"),
        ({"frames": -1}, "frames -1 must be a whole number from 0 to 3"),
        ({"frames": 4}, "frames 4 must be a whole number from 0 to 3"),
        ({"devices": []}, "devices is empty: give at least one"),
        ({"guidance_interval": 0.5}, "guidance_interval 0.5 must be two noise levels"),
        ({"height": 16.0}, "height 16.0 must be a positive multiple of 2"),
        ({"height": SIDE + 1}, f"height {SIDE + 1} must be a positive multiple of 2"),
        ({"width": -2}, "width -2 must be a positive multiple of 2"),
        ({"scheduler": "eulr"}, "scheduler 'eulr' is unknown; known are ddim, "),
        ({"spacing": "even"}, "spacing 'even' is unknown; known are "),
        ({"negative_prompts": ["a", "b", "c"]}, "negative_prompts holds 3 texts for 2 prompts"),
        ({"noise": np.zeros((2, 8, 8, 3))}, r"noise has shape \[2, 8, 8, 3\], but must have \[2, 8, 8, 4\]"),
        (
            {"image": np.zeros((8, 8, 3))},
            r"shape \[8, 8, 3\], but the output is \[16, 16, 3\]: resize it to height 16 and width",
        ),
        ({"image": np.zeros((SIDE, SIDE, 3)), "strength": 0.0}, "strength 0.0 must be in"),
        ({"image": np.zeros((SIDE, SIDE, 3)), "strength": 1.1}, "strength 1.1 must be in"),
        ({"image": np.zeros((SIDE, SIDE, 3)), "strength": 0.2}, "leave at least one of 3 steps"),
    ],
)
def test_bad_arguments_are_named(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        jaxdiff.generate(*tiny, ["a", "b"], **{"steps": STEPS} | options)


def test_images_that_are_no_numbers_are_not_drawn_black(tiny, three):
    model, params = tiny
    broken = params | {"vae": jax.tree.map(lambda x: x * np.nan, params["vae"])}
    with pytest.raises(FloatingPointError, match=r"3 of 3 images, the first 'a castle', came out as .*: lower guid"):
        jaxdiff.generate(model, broken, PROMPTS, seed=7, steps=STEPS)
    with pytest.raises(FloatingPointError, match=r"1 of 2 images, the first 'b', .*float16 overflows"):
        check_finite(np.array([True, False]), ["a", "b"], tiny_model(dtype=jnp.float16))


def test_no_prompts_are_refused(draw):
    with pytest.raises(ValueError, match="prompts is empty"):
        draw([])


# The pure pieces, in a program of the caller's own.


def latents_of(params, embeddings, scale, *, model, uncond, noise, steps=2):
    """Prompt embeddings [B, L, D] to latents, by the pieces that the package offers."""
    denoise = jaxdiff.denoiser(model, params, jaxdiff.Conditioning(embeddings), uncond, scale)
    times, noise_scale = jaxdiff.time_grid(model.scheduler, steps, "ddim")
    scheduler = jaxdiff.get_scheduler("ddim", model.scheduler)
    return jaxdiff.sample(denoise, noise_scale * noise, times, scheduler, jax.random.key(0))


@pytest.fixture(scope="module")
def pieces(tiny):
    """A jitted function of (params, embeddings [1, L, D], scale), params, and embeddings [3, L, D]."""
    model, params = tiny
    encode_text = jax.jit(jaxdiff.encode_text, static_argnums=0)
    cond, uncond = (encode_text(model, params, jaxdiff.tokenize(model, texts)) for texts in (PROMPTS, [""] * 3))
    uncond = jax.tree.map(lambda a: a[:1], uncond)
    noise = jaxdiff.initial_noise(image_keys(7, 1), LATENT)
    f = functools.partial(latents_of, model=model, uncond=uncond, noise=noise)
    return jax.jit(f), params, cond.embeddings


@pytest.mark.slow
def test_the_pieces_under_one_jit_draw_what_generate_draws(tiny, draw):
    model, params = tiny
    times, noise_scale = jaxdiff.time_grid(model.scheduler, STEPS, "ddim")

    @jax.jit
    def images(params, tokens, negative, seed):
        cond, uncond = (jaxdiff.encode_text(model, params, t) for t in (tokens, negative))
        denoise = jaxdiff.denoiser(model, params, cond, uncond, 7.5)
        keys = jax.random.key(seed)[None]
        x = noise_scale * jaxdiff.initial_noise(keys, LATENT)
        x0 = jaxdiff.sample(denoise, x, times, jaxdiff.get_scheduler("ddim", model.scheduler), keys)
        return jnp.round(255 * jaxdiff.decode(model, params, x0))

    tokens, negative = (jaxdiff.tokenize(model, [text]) for text in (PROMPTS[0], ""))
    drawn = np.asarray(images(params, tokens, negative, 7)).astype(np.uint8)
    assert levels(drawn, draw(PROMPTS[0], seed=7)) <= LEVEL


def test_the_pieces_map_over_prompts_and_scales(pieces):
    f, params, embeddings = pieces
    scales = jnp.array([1.5, 4.0, 7.5])
    mapped = jax.jit(jax.vmap(f, (None, 0, 0)))(params, embeddings[:, None], scales)
    one_by_one = np.stack([f(params, e[None], s) for e, s in zip(embeddings, scales, strict=True)])
    np.testing.assert_allclose(mapped, one_by_one, atol=1e-4)  # float32 sums in another order, latents of size 10
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 0.1


@pytest.mark.slow
def test_gradients_flow_through_sampling(pieces):
    """The derivative along a direction of the embeddings, by `grad` and by central differences.

    These are exact to O(h^2) and lose float32's 1e-7 |f| / h: with h = 1e-2 both are under a per cent here.
    """
    f, params, embeddings = pieces

    def loss(embeddings):
        return jnp.mean(f(params, embeddings, jnp.float32(3.0)) ** 2)

    at, h = embeddings[:1], 1e-2
    gradient = np.asarray(jax.grad(loss)(at))
    direction = gradient / np.linalg.norm(gradient)
    assert np.linalg.norm(gradient) > 1e-3
    slope = (loss(at + h * direction) - loss(at - h * direction)) / (2 * h)
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=2e-2)


@pytest.mark.slow
def test_the_pieces_take_bytes_as_generate_does(tiny, image):
    model, params = jaxdiff.with_controlnets(*tiny, tiny_controlnet(tiny[0]))
    cond = jaxdiff.encode_text(model, params, jaxdiff.tokenize(model, ["a castle"]))

    @jax.jit
    def pieces(x):
        latents = jaxdiff.encode(model, params, x)
        denoise = jaxdiff.denoiser(model, params, cond, control_images=[x])  # whose scale is 1
        return latents, denoise(latents, 500.0)

    for a, b in zip(pieces(image[None]), pieces(image[None] / np.float32(255)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # float32 in another program


# Devices.


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """What `tests/support/draw_on_devices.py` reports from a process with eight simulated devices."""
    out = tmp_path_factory.mktemp("devices")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "tests.support.draw_on_devices", str(out)],
        cwd=Path(__file__).parent.parent,
        env=env,
        check=True,
    )
    return dict(np.load(out / "images.npz")) | json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_devices_do_not_change_images(eight_devices):
    """Sixteen images on eight devices; nine, which does not divide; five, which is fewer than devices."""
    assert eight_devices["device_count"] == 8
    assert eight_devices["one"].shape == (9, SIDE, SIDE, 3)
    assert levels(eight_devices["sixteen"][:9], eight_devices["one"]) <= LEVEL
    assert levels(eight_devices["nine"], eight_devices["one"]) <= LEVEL
    assert levels(eight_devices["five"], eight_devices["one"][:5]) <= LEVEL
    assert levels(eight_devices["five_stepwise"], eight_devices["one"][:5]) <= LEVEL  # drawn in pieces
    drawn, one = eight_devices["from_images"], eight_devices["from_images_one"]
    assert levels(drawn, one) <= LEVEL  # images, masks and control images go to where their image is drawn
    assert min(levels(a, b) for a, b in itertools.combinations(one, 2)) > 10


@pytest.mark.slow
def test_parameters_are_drawn_from_where_they_were_put(eight_devices):
    """On all those devices even if the images are fewer; and sample.py does, in whatever order a mesh has them."""
    assert eight_devices["partitions_commanded"] == [8]
    assert levels(eight_devices["five_replicated"], eight_devices["five"]) <= LEVEL
    assert levels(eight_devices["commanded"], eight_devices["sixteen"]) <= LEVEL


def test_parameters_put_elsewhere_than_is_drawn(tiny):
    model, params = tiny
    device = jax.devices()[0]
    np.testing.assert_array_equal(
        jaxdiff.generate(model, jaxdiff.replicate(params), PROMPTS[0], steps=STEPS),
        jaxdiff.generate(model, params, PROMPTS[0], steps=STEPS, devices=[device]),
    )
    with pytest.raises(ValueError, match="devices differ from the 1 that params were put on: leave out devices"):
        as_devices([device, object()], 2, jaxdiff.replicate(params))


@pytest.mark.slow
def test_devices_draw_without_talking_to_each_other(eight_devices):
    assert eight_devices["partitions"] == [8]
    assert eight_devices["collectives"] == [[]]
    assert eight_devices["collectives_of_a_sum"] == ["all-reduce"]  # the search does find them
