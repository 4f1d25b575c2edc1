"""The stages, the optimisation step and the loop, on the tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import parallel
from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.diffusion_loss import min_snr_weight
from jaxdiff.diffusion.schedules import at, noise_schedule
from jaxdiff.training.losses import contrastive_loss, kl_divergence, reconstruction_loss
from jaxdiff.training.optimizer import learning_rate, optimizer
from jaxdiff.training.options import OptionsError
from jaxdiff.training.precompute import encoder, fingerprint
from jaxdiff.training.stages import clip_params, clip_stage, diffusion_stage, random_times, vae_stage
from jaxdiff.training.train_step import accumulated_grad, ema_update
from tests.support.line import LINE, line_data, linear_stage
from tests.support.stages import BATCH, keys, options, pairs, trained, whole_model
from tests.support.tiny import LATENT, VAE, tiny_params, tokenizer


@pytest.fixture(scope="module")
def params():
    return clip_params(tiny_params(whole_model()))


@pytest.fixture(scope="module")
def denoising_loss():
    """(params, batch, keys) -> loss of the UNet's stage with every caption kept."""
    loss = jax.jit(diffusion_stage(whole_model(), caption_dropout=0.0).loss)
    return lambda *args: float(loss(*args)[0])


@pytest.fixture(scope="module")
def gradients(params):
    """(loss, gradient) of the UNet's stage by all parameters, for a model built with the given options."""

    def run(**kwargs):
        loss = diffusion_stage(whole_model(**kwargs)).loss
        return jax.jit(jax.value_and_grad(lambda p: loss(p, pairs(BATCH), keys())[0]))(params)

    return functools.cache(run)


# --- losses


def test_contrastive_loss_is_the_cross_entropy_of_both_directions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7))
    loss, _ = contrastive_loss(a, b, 3.0, np.eye(5, dtype=bool))
    cosines = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    p = np.exp(3.0 * cosines)
    expected = -0.5 * (np.log(np.diag(p) / p.sum(1)) + np.log(np.diag(p) / p.sum(0))).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.slow
def test_equal_captions_are_not_each_others_negatives():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 7))
    b[1] = b[0]
    equal = np.eye(3, dtype=bool)
    equal[0, 1] = equal[1, 0] = True
    gradient = jax.grad(lambda a: contrastive_loss(a, b, 3.0, equal)[0])(a)
    # Turning image 0 towards image 1's caption, which is its own, must only ever help.
    towards = jax.jvp(lambda a: contrastive_loss(a, b, 3.0, equal)[0], (a,), (np.stack([b[0], 0 * b[0], 0 * b[0]]),))[1]
    assert towards < 0
    assert np.isfinite(gradient).all()
    assert contrastive_loss(a, b, 3.0, equal)[0] < contrastive_loss(a, b, 3.0, np.eye(3, dtype=bool))[0]


def test_kl_divergence_of_known_gaussians():
    assert kl_divergence(jnp.zeros(3), jnp.zeros(3)) == 0
    # KL(N(1, e) || N(0, 1)) = (1 + e - 1 - 1) / 2
    np.testing.assert_allclose(kl_divergence(jnp.ones(3), jnp.ones(3)), (np.e - 1) / 2, rtol=1e-6)


def test_reconstruction_loss_measures_tone_and_edges():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)), jnp.float32)
    assert reconstruction_loss(x, x) == 0
    np.testing.assert_allclose(reconstruction_loss(x + 0.25, x), 0.25, rtol=1e-5)  # no edge is wrong
    checkers = 0.25 * (-1.0) ** np.add.outer(np.arange(8), np.arange(8))[None, :, :, None]
    # At full size |error| 0.25 and both differences 0.5; the halved sizes average to nothing.
    np.testing.assert_allclose(reconstruction_loss(x + checkers, x, 1.0, 2), (0.25 + 2 * 0.5) / 2, rtol=1e-4)


# --- state


def test_ema_forgets_the_start_then_keeps_its_decay():
    ema, params = {"w": jnp.asarray([1.0])}, {"w": jnp.asarray([3.0])}
    # d = (1 + 0) / (10 + 0) at the first step, the given decay later.
    np.testing.assert_allclose(ema_update(ema, params, 0.99, 0)["w"], 0.1 * 1 + 0.9 * 3, rtol=1e-6)
    np.testing.assert_allclose(ema_update(ema, params, 0.99, 10**6)["w"], 0.99 * 1 + 0.01 * 3, rtol=1e-6)


def test_learning_rate_warms_up_and_decays_to_zero():
    rate = learning_rate(options(steps=100, warmup_steps=10, learning_rate=2.0, schedule="cosine"))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 1, 2, 1, 0], atol=1e-6)
    linear = learning_rate(options(steps=100, warmup_steps=10, learning_rate=2.0, schedule="linear"))
    np.testing.assert_allclose(
        [linear(0), linear(5), linear(10), linear(28), linear(100)], [0, 1, 2, 1.6, 0], atol=1e-6
    )
    constant = learning_rate(options(warmup_steps=0, learning_rate=2.0))
    assert constant(0) == constant(50) == 2.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 6}, "batch_size 6"),
        ({"batch_size": 8, "accumulate": 3}, "accumulate"),
        ({"schedule": "step"}, "schedule"),
        ({"steps": 0}, "steps"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_options_that_do_not_fit_are_named(changes, named):
    with pytest.raises(OptionsError, match=named):
        options(**changes).check(devices=4)


def test_decay_spares_vectors():
    weights = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    tx = optimizer(options(weight_decay=0.5, learning_rate=0.1))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not updates["bias"].any()
    assert updates["scale"] == 0


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    check_parts(linear_stage(), LINE, line_data(BATCH))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [vae_stage, diffusion_stage])
def test_a_batch_of_images_in_parts_gives_the_gradient_of_the_whole(stage, params):
    latents = np.random.default_rng(0).normal(size=(BATCH, *LATENT)).astype(np.float32)
    check_parts(stage(whole_model()), params, {**pairs(BATCH), "latents": latents})


def check_parts(stage, params, batch):
    mesh = parallel.mesh(devices=jax.devices()[:1])
    trained = {k: params[k] for k in stage.trainable}

    def grad(parts):
        run = jax.jit(lambda p: accumulated_grad(stage.loss, p, params, batch, keys(), parts, mesh))
        return jax.device_get(run(trained))

    whole, metrics = grad(1)
    parts, part_metrics = grad(2)
    np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], rtol=1e-5)
    # Sums in another order: float32 rounding (6e-8) grown by the depth of the network; relative to the largest entry
    # of each array, for entries that cancel have no relative precision of their own.
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-7)


# --- stages


@pytest.mark.slow
@pytest.mark.parametrize("stage", [clip_stage, vae_stage])
def test_the_loss_of_each_stage_falls(stage, params):
    """The UNet's is one of those in test_finetune.py."""
    _, before, after = trained(stage(whole_model()), params, pairs(), steps=20)
    assert after < 0.85 * before


@pytest.mark.slow
def test_dropping_every_caption_makes_the_loss_independent_of_them(params, denoising_loss):
    batch = pairs(BATCH)
    other = {**batch, "tokens": tokenizer()(["blurry"] * BATCH)}
    dropping = jax.jit(diffusion_stage(whole_model(), caption_dropout=1.0).loss)
    assert dropping(params, batch, keys())[0] == dropping(params, other, keys())[0]
    assert denoising_loss(params, batch, keys()) != denoising_loss(params, other, keys())


@pytest.mark.slow
def test_min_snr_weighs_each_example_by_its_time(params, denoising_loss):
    model, batch = whole_model(), pairs(BATCH)
    one, first = {k: v[:1] for k, v in batch.items()}, keys()[:1]
    weighted = jax.jit(diffusion_stage(model, caption_dropout=0.0, min_snr_gamma=0.01).loss)(params, one, first)[0]
    time_key = jax.random.split(first[0], 3)[:1]
    time = at(noise_schedule(model.scheduler), random_times(model.scheduler, time_key))
    weight = min_snr_weight(time, model.scheduler.prediction_type, 0.01)
    assert weight[0] < 0.9  # gamma is small enough to bind at this time
    np.testing.assert_allclose(weighted / denoising_loss(params, one, first), weight[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"offset_noise": 0.5}, {"input_perturbation": 0.5}, {"times": "logit_normal"}])
def test_what_is_said_of_noise_and_times_reaches_the_loss(params, denoising_loss, change):
    changed = jax.jit(diffusion_stage(whole_model(), caption_dropout=0.0, **change).loss)
    plain = denoising_loss(params, pairs(BATCH), keys())
    assert abs(changed(params, pairs(BATCH), keys())[0] / plain - 1) > 1e-3  # rounding changes less than 1e-4


def test_times_cover_the_process():
    many = keys(4096)
    t = np.asarray(random_times(SchedulerConfig(num_train_timesteps=4), many))
    assert set(t.tolist()) == {0.0, 1.0, 2.0, 3.0}
    # Binomial with p = 1/4: a share's deviation is sqrt(3/16/4096) = 0.0068; five of them.
    np.testing.assert_allclose(np.bincount(t.astype(int)) / len(t), 0.25, atol=0.034)
    flow = SchedulerConfig(class_name="FlowMatchEulerDiscreteScheduler", beta_schedule="flow", shift=3.0)
    t = np.asarray(random_times(flow, many))
    assert 0 <= t.min() < t.max() <= 1000
    assert len(np.unique(t)) > 4000  # a continuum
    np.testing.assert_allclose(np.median(t), 750, atol=30)  # 3 / (1 + 2 * 1/2) * 1/2 of 1000


@pytest.mark.slow
def test_no_gradient_flows_into_the_autoencoder(gradients):
    _, grads = gradients()
    for part, flows in (("unet", True), ("text_encoder", True), ("vae", False)):
        assert any(np.any(g != 0) for g in jax.tree.leaves(grads[part])) == flows, part


def test_cached_latents_give_the_loss_of_their_images(params, denoising_loss):
    model, batch = whole_model(), pairs(BATCH)
    texts = ["castle", "red", "dragon", "blue"]
    rows = [{"image": image, "text": text} for image, text in zip(batch["image"], texts, strict=True)]
    stored = encoder(model, params, embeddings=False, batch_size=3)(rows)
    assert stored["latents"].dtype == np.float16
    np.testing.assert_array_equal(stored["tokens"], batch["tokens"])
    # Latents are rounded to float16: 2**-11 = 5e-4.
    np.testing.assert_allclose(denoising_loss(params, stored, keys()), denoising_loss(params, batch, keys()), rtol=5e-3)


@pytest.mark.slow
def test_remat_changes_no_gradient_and_bfloat16_little(gradients):
    value, grads = gradients()
    again, regrads = gradients(remat=True)
    half, half_grads = gradients(dtype=jnp.bfloat16)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(regrads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)
    np.testing.assert_allclose(half, value, rtol=0.05)  # bfloat16 keeps 8 bits (4e-3), through some ten layers
    assert half != value
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(half_grads))


def test_fingerprint_follows_the_autoencoder_and_the_description(params):
    model = whole_model()
    first = fingerprint(model, params, {"views": 2})
    other = {**params, "vae": jax.tree.map(lambda x: x + 1e-3, params["vae"])}
    renamed = dataclasses.replace(model, vae=model.vae.copy(config=dataclasses.replace(VAE, scaling_factor=0.5)))
    assert first == fingerprint(model, params, {"views": 2})
    assert len({first, fingerprint(model, other, {"views": 2}), fingerprint(renamed, params, {"views": 2}),
                fingerprint(model, params, {"views": 3})}) == 4  # fmt: skip
