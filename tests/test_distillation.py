"""Distillation to few steps: the mathematics on data whose paths are known, and the stages on the tiny model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion import consistency
from jaxdiff.diffusion.schedules import noise_schedule
from jaxdiff.models.layers import timestep_embedding
from jaxdiff.training.checks import check_settings
from jaxdiff.training.loop import fit
from jaxdiff.training.options import OptionsError
from jaxdiff.training.train_step import STATE
from jaxdiff.training.trainables import described, make
from tests.support.batches import FromMemory
from tests.support.distillation import FIXED, ZERO_SNR, eight
from tests.support.line import one_device, same
from tests.support.processes import finish, start
from tests.support.stages import options, settings, whole_model
from tests.support.tiny import tiny_params

SPREAD = 0.5  # the data are Gaussian, of this deviation


# --- Gaussian data: x0 ~ N(0, SPREAD^2), so that a path is x(phi) = C rho(phi)


def rho(phi):
    return jnp.sqrt((SPREAD * jnp.cos(phi)) ** 2 + jnp.sin(phi) ** 2)


def ideal_velocity(x, phi):
    """v of the exact denoiser, E[cos eps - sin x0 | x]."""
    return jnp.cos(phi) * jnp.sin(phi) * (1 - SPREAD**2) / rho(phi) ** 2 * x


def ideal_network(x, phi):
    """F of the exact consistency function, f = cos x - sin F = SPREAD x / rho."""
    return (jnp.cos(phi) - SPREAD / rho(phi)) / jnp.sin(phi) * x


def gaussian(count=64):
    """Points of many angles: (x [B, 1], phi [B])."""
    phi = jnp.linspace(0.05, 1.57, count)
    return rho(phi)[:, None] * jax.random.normal(jax.random.key(0), (count, 1)), phi


def test_the_exact_consistency_function_has_no_tangent():
    """Its derivative along the path is zero; that of another function is not."""
    x, phi = gaussian()
    teacher, one = ideal_velocity(x, phi[:, None]), jnp.ones_like(phi)

    def tangent(network):
        return consistency.tangent(lambda x, t: network(x, t[:, None]), x, phi, phi, one, teacher, 1.0)[1]

    np.testing.assert_allclose(tangent(ideal_network), 0, atol=2e-5)
    assert float(jnp.abs(tangent(ideal_velocity)).mean()) > 0.1


def test_the_tangent_is_the_derivative_along_the_path():
    """Of any function, here one without meaning, by finite differences in float64 of f on the teacher's exact path."""
    x, phi = (np.asarray(a, np.float64) for a in gaussian())

    def network(x, phi):
        return jnp.sin(3 * x) * jnp.cos(2 * phi) + x**2 / 3

    def f(phi_to):
        moved = x * np.asarray(rho(phi_to) / rho(phi))[:, None]
        to = phi_to[:, None]
        return np.cos(to) * moved - np.sin(to) * (np.sin(3 * moved) * np.cos(2 * to) + moved**2 / 3)

    h = 1e-3
    expected = (f(phi + h) - f(phi - h)) / (2 * h)
    x32, phi32 = jnp.asarray(x, jnp.float32), jnp.asarray(phi, jnp.float32)
    teacher = ideal_velocity(x32, phi32[:, None])
    # Times that go at another pace than the angle: t = 100 phi^2.
    t, rate = 100 * phi32**2, 200 * phi32
    value, g = consistency.tangent(
        lambda x, t: network(x, jnp.sqrt(t / 100)[:, None]), x32, t, phi32, rate, teacher, 1.0
    )
    np.testing.assert_allclose(value, network(x32, phi32[:, None]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g, expected, rtol=1e-2, atol=3e-3)


def legendre(phi, count):
    """The first polynomials of Legendre on the angles of `gaussian`, [B, count]."""
    u = (2 * phi[:, None] - 1.62) / 1.52
    terms = [jnp.ones_like(u), u]
    for n in range(1, count - 1):
        terms.append(((2 * n + 1) * u * terms[n] - n * terms[n - 1]) / (n + 1))
    return jnp.concatenate(terms, -1)


def test_the_loss_leads_to_the_closed_form():
    """A polynomial of the angle times x is taught by the exact velocity alone: the only point where the gradient is
    zero is the exact consistency function, and gradient descent is drawn to it."""
    count, (x, phi) = 8, gaussian(256)
    teacher, one = ideal_velocity(x, phi[:, None]), jnp.ones_like(phi)

    def network(weights, x, phi):
        return (weights * legendre(phi, count)).sum(-1, keepdims=True) * x

    @jax.jit
    @jax.grad
    def gradient(weights):  # without normalisation, so that it is linear in the weights
        f, g = consistency.tangent(functools.partial(network, weights), x, phi, phi, one, teacher, 1.0)
        return ((f - jax.lax.stop_gradient(f + g)) ** 2).mean()

    start = np.asarray(gradient(jnp.zeros(count)), np.float64)
    slope = np.stack([np.asarray(gradient(row)) - start for row in jnp.eye(count)], 1)
    assert np.linalg.eigvals(slope).real.min() > 0
    weights = jnp.asarray(np.linalg.solve(slope, -start), jnp.float32)
    ends = jnp.cos(phi)[:, None] * x - jnp.sin(phi)[:, None] * network(weights, x, phi)
    np.testing.assert_allclose(ends, SPREAD * x / rho(phi)[:, None], atol=5e-3)


def test_the_angle_of_a_schedule_goes_from_the_image_to_pure_noise():
    schedule = noise_schedule(ZERO_SNR)
    phi, rate = consistency.angles(schedule)
    np.testing.assert_allclose(np.cos(phi), schedule.alpha, atol=1e-6)
    np.testing.assert_allclose(np.sin(phi), schedule.sigma, atol=1e-6)
    assert phi[-1] == pytest.approx(np.pi / 2)
    steps = np.diff(phi.astype(np.float64))
    np.testing.assert_allclose(2 / rate[1:-1], steps[1:] + steps[:-1], rtol=1e-3)


def test_a_consistency_function_begins_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    t = jnp.asarray([0.0, 19.0, 999.0])
    f = consistency.consistency(jnp.ones_like(x), x, t)
    np.testing.assert_array_equal(f[0], x[0])
    np.testing.assert_allclose(f[1:], 1.0, atol=1e-4)


# --- the stages on the tiny model


@pytest.fixture(scope="module")
def model():
    return whole_model(ZERO_SNR)


@pytest.fixture(scope="module")
def params(model):
    return tiny_params(model)


@pytest.fixture(scope="module")
def examples():
    return eight()


STAGES = ["scm", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("lcm", "lcm_lora"))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_unbroken_one(stage, model, params, examples, tmp_path):
    """Bit for bit. Teacher, text encoder and autoencoder stay as they were."""
    target = make(settings(stage, distillation=FIXED), model, params)

    def run(folder, steps):
        o = options(steps=steps, batch_size=4, learning_rate=1e-2, ema_decay=0.5)
        return fit(target.stage, target.params, FromMemory(examples, 4, 7), o, tmp_path / folder, mesh=one_device())

    unbroken = run("a", 3)
    run("b", 1)
    assert same(unbroken, run("b", 3))
    (learnt,) = target.stage.trainable
    assert not same(target.params[learnt], unbroken.params[learnt])
    frozen = [name for name in target.params if name != learnt]
    assert same({n: target.params[n] for n in frozen}, {n: unbroken.params[n] for n in frozen})


@pytest.mark.slow
def test_every_mesh_gives_the_same_losses(tmp_path):
    """Though the loss also reads the step and the moving average, which are divided as the parameters are."""
    finish(start("tests.support.distil_on_devices", tmp_path, devices=4))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 4
    for stage in ("scm", "lcm"):
        one, other = report[f"{stage} one"], report[f"{stage} fsdp"]
        assert len(set(one["losses"])) == 3
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-4)
        np.testing.assert_allclose(other["norm"], one["norm"], rtol=1e-5)


@pytest.mark.slow
def test_fast_sinusoids_of_time_have_no_weight_and_get_none(model, params, examples, tmp_path):
    target = make(settings("scm", distillation={**FIXED, "time_frequency": 0.05}), model, params)
    channels = model.unet.config.block_out_channels[0]
    fast = 10000.0 ** (-np.arange(channels // 2) / (channels // 2)) > 0.05
    assert fast.any()
    assert not fast.all()
    o = options(steps=1, batch_size=4, learning_rate=1e-2)
    trained = fit(target.stage, target.params, FromMemory(examples, 4, 7), o, tmp_path, mesh=one_device()).params[
        "unet"
    ]
    before, after = (np.asarray(unet["time_embedding"]["linear_1"]["kernel"]) for unet in (params["unet"], trained))
    np.testing.assert_array_equal(after[np.tile(fast, 2)], 0)
    assert (after[np.tile(~fast, 2)] != before[np.tile(~fast, 2)]).all()
    # These are the rows of the sinusoids that turn fast.
    moved = np.asarray(
        timestep_embedding(jnp.asarray([501.0]), channels) - timestep_embedding(jnp.asarray([500.0]), channels)
    )
    assert np.abs(moved[0, np.tile(~fast, 2)]).max() < 0.051


@pytest.mark.slow
def test_where_the_student_learns_the_teachers_own_guidance_alone_it_says_nothing_new(model, params, examples):
    """Before its derivative comes in, a student of an unguided teacher has nothing to learn but what smoothing took."""
    scales = {"guidance_min": 1.0, "guidance_max": 1.0, "tangent_warmup": 10**9, "time_frequency": 1.0}
    target = make(settings("scm", distillation=scales), model, params)
    state = {"step": jnp.int32(0), "ema": {"unet": target.params["unet"]}}
    batch, keys = {k: x[:4] for k, x in examples.items()}, jax.random.split(jax.random.key(0), 4)
    loss, metrics = jax.jit(target.stage.loss)({**target.params, STATE: state}, batch, keys)
    assert loss < 1e-6
    assert metrics["tangent"] < 1e-4


@pytest.mark.parametrize(
    ("stage", "changes", "named"),
    [
        ("lcm", {"prediction_type": "epsilon"}, "prediction_type=epsilon"),
        ("scm", {"min_snr_gamma": 5.0}, "min_snr_gamma=5.0"),
        ("lcm_lora", {"distillation": {"guidance_dim": 8}}, "distillation.guidance_dim=8"),
        ("unet", {"distillation": {"guidance_dim": 8}}, "distillation.guidance_dim=8"),
        ("lcm", {"distillation": {"guidance_min": 16.0}}, "distillation.guidance_min 16.0 must be at most"),
        ("lcm", {"distillation": {"huber_c": 0.0}}, "distillation.huber_c 0.0 must be"),
    ],
)
def test_settings_that_a_student_does_not_follow_are_refused(stage, changes, named):
    config = settings(stage)
    config.data.path = "images"
    check_settings(config)
    with pytest.raises(OptionsError, match=named):
        check_settings(settings(stage, **changes))


def test_models_that_cannot_be_students_are_refused(model, params):
    noise = SchedulerConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    cases = [
        ("scm", whole_model(noise), {}, "predicts epsilon, and the stage scm needs v_prediction"),
        (
            "lcm",
            whole_model(SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler"})),
            {},
            "is a flow",
        ),
        ("lcm", model, {"distillation": {"solver_steps": 1001}}, "solver_steps 1001 must be at most 1000"),
        ("lcm", model, {"trainable": ("unet", "text_encoder")}, "trainable .* means nothing"),
    ]
    for stage, given, changes, named in cases:
        with pytest.raises(OptionsError, match=named):
            described(settings(stage, **changes), given, params)
    told = make(settings("lcm", distillation={"guidance_dim": 8}), model, params)
    with pytest.raises(OptionsError, match="is a distilled model already"):
        described(settings("lcm"), told.model, told.params)
