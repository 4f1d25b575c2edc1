"""Two-stage drawing, variations, blends of prompts, tiled decoding and tiny previews through `generate`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.config import TinyVAEConfig
from jaxdiff.diffusion.inpainting import masked_blending
from jaxdiff.models.model import with_controlnets
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.sampling.inputs import slerp
from jaxdiff.sampling.noise import image_keys
from tests.support.comparison import levels
from tests.support.tiny import LATENT, SIDE, tiny_controlnet

STEPS, LEVEL = 3, 1  # LEVEL: see test_generate


@pytest.fixture(scope="module")
def draw(tiny):
    return functools.partial(jaxdiff.generate, *tiny, steps=STEPS)


def noise(seed: int, shape=LATENT):
    return np.asarray(jaxdiff.initial_noise(image_keys(seed, 1), shape))


def test_slerp_keeps_length_and_turns_evenly():
    """At 90 degrees a third of the way is 30 degrees: cos and sin of it."""
    a, b = jnp.array([[2.0, 0.0], [1.0, 1.0]]), jnp.array([[0.0, 2.0], [1.0, 1.0]])
    turned = slerp(a, b, jnp.array([1 / 3, 0.4]))
    np.testing.assert_allclose(turned[0], 2 * np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)]), atol=1e-6)
    np.testing.assert_allclose(turned[1], [1, 1], atol=1e-6)  # of one direction
    x, y = (np.random.default_rng(i).standard_normal((1, 64, 64, 4), np.float32) for i in range(2))
    assert np.std(slerp(x, y, jnp.array([0.5]))) == pytest.approx(1, abs=0.02)  # the mean of both would have 0.71


def test_a_variation_is_drawn_from_noise_between_two_seeds(draw):
    mixed = slerp(noise(3), noise(9), jnp.array([0.25]))
    a = draw(["a castle"], seed=3, variation_seed=9, variation_strength=0.25)
    assert levels(a, draw(["a castle"], noise=mixed)) <= LEVEL
    assert levels(a, draw(["a castle"], seed=3)) > LEVEL
    assert (
        levels(draw(["a castle"], seed=3, variation_seed=9, variation_strength=0), draw(["a castle"], seed=3)) <= LEVEL
    )
    assert (
        levels(draw(["a castle"], seed=3, variation_seed=9, variation_strength=1), draw(["a castle"], seed=9)) <= LEVEL
    )


@pytest.mark.slow
def test_a_film_goes_from_one_prompt_to_the_other(draw):
    """And from the one's negative prompt to the other's."""
    ends = [draw([p], n, seed=3) for p, n in (("a castle", "blurry"), ("a red dragon", "a blue house"))]
    other = {"blend_prompts": "a red dragon", "blend_negative_prompts": "a blue house", "blend": [0.0, 0.5, 1.0]}
    first, middle, last = np.split(draw(["a castle"] * 3, "blurry", seed=[3] * 3, **other), 3)
    assert levels(first, ends[0]) <= LEVEL
    assert levels(last, ends[1]) <= LEVEL
    assert min(levels(middle, end) for end in ends) > LEVEL


LONG = "a castle, " * 40  # a dozen chunks of the tiny tokenizer's


@pytest.mark.slow
def test_an_image_does_not_depend_on_a_longer_prompt_beside_it(draw):
    both = draw(["a castle", LONG], seed=3)
    assert levels(both[:1], draw("a castle", seed=3)) <= LEVEL
    assert levels(both[1:], draw(LONG, seed=4)) <= LEVEL


def test_a_long_negative_prompt_leaves_the_prompt_alone(draw):
    """The first image has no use for its negative prompt, the second has a short one."""
    drawn = draw(["a castle"] * 2, [LONG, "blurry"], seed=[3, 3], guidance_scale=[1.0, 7.5])
    assert levels(drawn[:1], draw("a castle", seed=3, guidance_scale=1.0)) <= LEVEL
    assert levels(drawn[1:], draw("a castle", "blurry", seed=3)) <= LEVEL


def test_a_film_from_a_short_prompt_to_a_long_one(draw):
    """The long one's other chunks come in smoothly: a step of 1e-4 in the blend changes little."""
    other = {"blend_prompts": LONG, "blend_negative_prompts": "a blue house", "blend": [0.0, 1e-4, 0.5, 1.0]}
    first, near, middle, last = np.split(draw(["a red dragon"] * 4, "blurry", seed=[3] * 4, **other), 4)
    ends = [draw(prompt, negative, seed=3) for prompt, negative in (("a red dragon", "blurry"), (LONG, "a blue house"))]
    assert levels(first, ends[0]) <= LEVEL
    assert levels(last, ends[1]) <= LEVEL
    assert levels(near, first) <= 2 * LEVEL
    assert min(levels(middle, end) for end in ends) > 2 * LEVEL


def test_a_mask_of_one_side_is_no_mask_of_the_other(tiny):
    """Conditionings of the caller's own may have none: all of their tokens count."""
    model, params = tiny
    rng = np.random.default_rng(0)
    x, embeddings, negative = (rng.standard_normal((1, *shape), np.float32) for shape in (LATENT, (24, 16), (24, 16)))
    ones = np.ones((1, 24), np.float32)
    denoised = [
        jax.jit(jaxdiff.denoiser(model, params, cond, jaxdiff.Conditioning(negative), 3.0))(x, 500.0)
        for cond in (jaxdiff.Conditioning(embeddings), jaxdiff.Conditioning(embeddings, attention_mask=ones))
    ]
    np.testing.assert_allclose(*denoised, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("upscale", ["pixel", "latent"])
def test_two_stages_are_the_small_image_enlarged_and_redrawn(upscale, tiny, draw):
    """Against the same put together from the pure pieces."""
    model, params = tiny
    drawn = draw(["a castle"], seed=3, hires=2, hires_strength=0.7, hires_upscale=upscale, guidance_scale=1.0)
    times, scale = jaxdiff.time_grid(model.scheduler, STEPS)
    tokens, method = jaxdiff.tokenize(model, ["a castle"]), jaxdiff.get_scheduler("ddim")
    height, width, channels = LATENT
    small, full = noise(3, (height // 2, width // 2, channels)), noise(3)
    start = STEPS - int(STEPS * 0.7)

    @jax.jit
    def expected(params):
        denoise = jaxdiff.denoiser(model, params, jaxdiff.encode_text(model, params, tokens))
        take = functools.partial(jaxdiff.sample, denoise, times=times, scheduler=method, key=jax.random.key(0))
        low = take(scale * small)
        if upscale == "latent":
            large = jax.image.resize(low, (1, *LATENT), "cubic")
        else:
            image = jax.image.resize(jaxdiff.decode(model, params, low), (1, SIDE, SIDE, 3), "lanczos3")
            large = jaxdiff.encode(model, params, jnp.clip(image, 0, 1))
        x = times.alpha[start] * large + times.sigma[start] * full
        return jaxdiff.decode(model, params, take(x, start=start))

    assert levels(drawn, np.asarray(jnp.round(255 * expected(params)).astype(jnp.uint8))) <= LEVEL


@pytest.mark.slow
def test_two_stages_from_an_image_with_a_mask_under_a_controlnet(tiny):
    """Both stages keep what the mask covers and follow the control image at their own size: from the pure pieces."""
    model, params = with_controlnets(*tiny, tiny_controlnet(tiny[0]))
    rng = np.random.default_rng(0)
    image, hint = (rng.random((1, SIDE, SIDE, 3), np.float32) for _ in range(2))
    mask = np.zeros((1, SIDE, SIDE, 1), np.float32)
    mask[:, :, 4:] = 1  # along the latents' borders at both sizes
    options = {"strength": 0.7, "hires_strength": 0.4, "steps": 5, "guidance_scale": 1.0}
    given = {"image": image, "mask": mask[..., 0], "control_images": hint}
    drawn = jaxdiff.generate(model, params, ["a castle"], seed=3, hires=2, **options, **given)
    times, _ = jaxdiff.time_grid(model.scheduler, 5)
    cond = jaxdiff.encode_text(model, params, jaxdiff.tokenize(model, ["a castle"]))

    def stage(side, start, eps, clean):
        pixels = side * SIDE // LATENT[0]
        at_size = [jax.image.resize(x, (1, pixels, pixels, x.shape[-1]), "linear") for x in (image, mask, hint)]
        denoise = jaxdiff.denoiser(model, params, cond, control_images=at_size[2:], controlnet_scale=(1.0,))
        original = jaxdiff.encode(model, params, at_size[0])
        small_mask = at_size[1][:, :: SIDE // LATENT[0], :: SIDE // LATENT[0]]
        scheduler = masked_blending(jaxdiff.get_scheduler("ddim"), original, eps, small_mask >= 0.5)
        x = times.alpha[start] * (original if clean is None else clean) + times.sigma[start] * eps
        return jaxdiff.sample(denoise, x, times, scheduler, jax.random.key(0), start=start)

    small, full = noise(3, (LATENT[0] // 2, LATENT[1] // 2, LATENT[2])), noise(3)

    @jax.jit
    def expected():
        low = stage(LATENT[0] // 2, 2, small, None)
        picture = jax.image.resize(jaxdiff.decode(model, params, low), (1, SIDE, SIDE, 3), "lanczos3")
        large = jaxdiff.encode(model, params, jnp.clip(picture, 0, 1))
        return jaxdiff.decode(model, params, stage(LATENT[0], 3, full, large))

    assert levels(drawn, np.asarray(jnp.round(255 * expected()).astype(jnp.uint8))) <= LEVEL


def test_strength_of_the_second_stage_is_traced(draw):
    from jaxdiff.sampling.generate import sampler

    options = {"seed": 3, "hires": 2, "guidance_scale": 1.0}  # the program of the test above, if that has run
    draw(["a castle"], **options, hires_strength=0.7)
    before = sampler.cache_info().misses
    strong, weak = (draw(["a castle"], **options, hires_strength=strength) for strength in (0.9, 0.4))
    assert levels(strong, weak) > LEVEL
    assert sampler.cache_info().misses == before


@pytest.mark.slow
def test_tiles_of_the_whole_change_nothing_and_smaller_ones_little(draw):
    """One tile that covers the image is the image; of smaller ones, the group norms and the seams differ."""
    whole = draw(["a castle"], seed=3)
    assert levels(draw(["a castle"], seed=3, tile=LATENT[0]), whole) <= LEVEL
    tiles = draw(["a castle"], seed=3, tile=LATENT[0] - 2)
    assert tiles.shape == whole.shape
    assert levels(tiles, whole) > LEVEL


@pytest.mark.slow
def test_frames_are_drawn_by_a_tiny_autoencoder_where_there_is_one(tiny, draw):
    model, params = tiny
    config = TinyVAEConfig(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    module = AutoencoderTiny(config)
    own = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    with_tiny = dataclasses.replace(model, tiny_vae=module), params | {"tiny_vae": own}
    image, frames = jaxdiff.generate(*with_tiny, ["a castle"], seed=3, steps=STEPS, frames=2)
    other, plain = draw(["a castle"], seed=3, frames=2)
    assert levels(image, other) <= LEVEL
    assert frames.shape == plain.shape == (1, 2, SIDE, SIDE, 3)
    assert levels(frames, plain) > LEVEL


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"hires": 1.0}, "hires 1.0 must be above 1"),
        ({"hires": 100.0}, "hires 100.0 must be above 1, and leave at least one"),
        ({"hires": 2, "hires_strength": 0.0}, "hires_strength 0.0 must be in"),
        ({"hires": 2, "hires_upscale": "esrgan"}, "known are pixel, latent and network"),
        ({"blend_prompts": "x", "blend": 1.5}, "blend 1.5 must be from 0.0 to 1.0"),
        ({"variation_seed": 1, "variation_strength": -0.1}, "variation_strength -0.1 must be from 0.0 to 1.0"),
        ({"blend_prompts": ["x", "y"]}, "blend_prompts holds 2 texts for 1 prompts"),
        ({"tile": 0}, "tile 0 must be a whole number of at least 1"),
        ({"seed": [1, 2]}, r"seed \[1, 2\] must be a whole number .* for each of 1 prompts"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"seed": 2**70}, "seed .* must be a whole number below"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf must be finite"),
        ({"hires": 2, "hires_strength": float("nan")}, "hires_strength nan must be in"),
    ],
)
def test_arguments_that_cannot_be_right(arguments, sentence, draw):
    with pytest.raises(ValueError, match=sentence):
        draw(["a castle"], **arguments)


@pytest.mark.parametrize("seed", [np.asarray(3), np.int32(3), 3 + 2**32, 3 - 2**32, [3]])
def test_a_seed_is_any_whole_number(seed):
    assert (image_keys(seed, 1) == image_keys(3, 1)).all()
