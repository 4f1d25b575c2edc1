"""Schedules, predictions, guidance and losses: the identities they must satisfy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError, SchedulerConfig
from jaxdiff.diffusion.diffusion_loss import diffusion_loss, min_snr_weight
from jaxdiff.diffusion.guidance import classifier_free
from jaxdiff.diffusion.prediction import PREDICTION_TYPES, add_noise, target, to_denoised
from jaxdiff.diffusion.schedules import Time, at, noise_schedule, shift_time
from jaxdiff.diffusion.spacing import AYS, SPACINGS
from jaxdiff.diffusion.times import time_grid
from tests.support.scheduler_cases import CONFIGS, FLOW, NAMES, SD1, ZERO_SNR

EPSILON_FLOW = dataclasses.replace(FLOW, class_name="DPMSolverMultistepScheduler", prediction_type="epsilon")

# A handful of float32 operations on numbers of order 1, 2**-24 each; divided by alpha or sigma where that is small.
ROUNDING = 1e-6


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def vp(angle) -> Time:
    """Variance-preserving times by the angle atan(sigma / alpha)."""
    angle = jnp.asarray(angle, jnp.float32)
    return Time(500 * angle, jnp.cos(angle), jnp.sin(angle))


def random_times(kind: str, count: int) -> Time:
    u = jax.random.uniform(jax.random.key(1), (count,), minval=0.05, maxval=0.95)
    if kind == "flow":
        return Time(1000 * u, 1 - u, u)
    if kind == "exploding":
        return Time(1000 * u, jnp.ones(count), 10 * u)
    return vp(u * jnp.pi / 2)


# ---- schedules


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.startswith("flow")])
def test_schedule_preserves_variance_and_falls(config):
    alpha, sigma = noise_schedule(CONFIGS[config])
    assert len(alpha) == CONFIGS[config].num_train_timesteps
    np.testing.assert_allclose(np.float64(alpha) ** 2 + np.float64(sigma) ** 2, 1, atol=2**-23)
    assert (np.diff(alpha) < 0).all()
    assert (np.diff(sigma) >= 0).all()


def test_zero_terminal_snr():
    """The last step holds no signal at all, the first is as it was: Lin et al. 2023, algorithm 1."""
    alpha, sigma = noise_schedule(ZERO_SNR)
    plain = noise_schedule(SD1)
    assert alpha[-1] == 0
    assert sigma[-1] == 1
    np.testing.assert_allclose(alpha[0], plain.alpha[0], rtol=1e-6)
    # Affine in alpha: differences keep their proportions.
    np.testing.assert_allclose(
        np.diff(alpha) / np.diff(plain.alpha), alpha[0] / (alpha[0] - plain.alpha[-1]), rtol=1e-3
    )


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'sigmoid' is unknown; known are linear, scaled_linear"):
        noise_schedule(SchedulerConfig(beta_schedule="sigmoid"))


def test_at_interpolates_and_stops_at_the_ends():
    schedule = noise_schedule(SD1)
    # Entries of the table have weights of 0 and 1, which rounds nothing.
    np.testing.assert_array_equal(at(schedule, [0, 500, 999]).sigma, schedule.sigma[[0, 500, 999]])
    between = at(schedule, 500.25)
    np.testing.assert_allclose(between.alpha, 0.75 * schedule.alpha[500] + 0.25 * schedule.alpha[501], rtol=1e-6)
    np.testing.assert_array_equal(at(schedule, [-3.0, 1200.0]).alpha, schedule.alpha[[0, -1]])
    # A chord between two neighbours on the unit circle lies within 1 - cos(half their angle, 0.006) of it.
    t = np.linspace(0, 999, 5000)
    np.testing.assert_allclose(at(schedule, t).alpha ** 2 + at(schedule, t).sigma ** 2, 1, atol=4e-5)
    one = noise_schedule(SchedulerConfig(trained_betas=(0.5,), num_train_timesteps=1))
    np.testing.assert_allclose(at(one, 0.0).alpha, 0.5**0.5, rtol=1e-6)


def test_betas_that_do_not_reach_all_timesteps_are_refused():
    """Else every later timestep would have the noise of the last beta."""
    with pytest.raises(ValueError, match=r"trained_betas .* holds 2 numbers for 1000 num_train_timesteps"):
        noise_schedule(SchedulerConfig(trained_betas=(0.1, 0.2)))


def test_flow_is_a_straight_line_at_any_time():
    t = np.linspace(0, 1000, 777)
    time = at(noise_schedule(FLOW), t)
    np.testing.assert_allclose(time.sigma, t / 1000, atol=ROUNDING)
    np.testing.assert_allclose(time.alpha, 1 - t / 1000, atol=ROUNDING)


def test_shift_multiplies_the_noise_to_signal_ratio():
    """sigma / alpha grows by the shift: the derivation of Esser et al. 2024, section 5.3.2."""
    t = np.linspace(0, 999, 50)
    shifted = shift_time(t, dataclasses.replace(FLOW, shift=3.0))
    u, v = t / 1000, shifted / 1000
    np.testing.assert_allclose(v / (1 - v), 3 * u / (1 - u), rtol=1e-9)
    np.testing.assert_allclose(shift_time(t, FLOW), t, rtol=1e-12)


# ---- time grids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", ["sd2", "zero_snr", "flow_shift", "trained"])
def test_grid_falls_from_noise_to_image(config, name):
    values = CONFIGS[config]
    for spacing in (None, *SPACINGS):
        if config == "flow_shift" and spacing in ("leading", *AYS):
            continue
        if config == "trained" and (spacing in AYS or name in ("lcm", "tcd")):
            continue  # a process without those levels, or that many times
        for steps in (1, 5, 30):
            times, scale = time_grid(values, steps, name, spacing)
            assert times.t.shape == times.alpha.shape == times.sigma.shape == (steps + 1,)
            assert {a.dtype for a in jax.tree.leaves(times)} == {np.dtype("float32")}
            assert np.isfinite(jax.tree.leaves(times)[1]).all()
            assert (np.diff(times.t[:-1]) <= 0).all()
            assert (np.diff(times.sigma) <= 0).all()
            assert (np.diff(times.alpha) >= 0).all()
            assert 0 < scale <= 1
            if config != "flow_shift":
                np.testing.assert_allclose(times.alpha**2 + times.sigma**2, 1, atol=ROUNDING)


def test_spacing_overrides_the_config():
    karras = dataclasses.replace(SD1, use_karras_sigmas=True, timestep_spacing="trailing")
    plain = dataclasses.replace(SD1, timestep_spacing="trailing")

    def t(config, spacing=None):
        return time_grid(config, 9, "euler", spacing)[0].t.tolist()

    assert t(karras) == t(plain, "karras") == t(karras, "karras")
    assert t(karras, "trailing") == t(plain)
    assert len({tuple(t(plain, s)) for s in SPACINGS}) == len(SPACINGS)


def test_program_does_not_depend_on_the_spacing():
    """Grids of one scheduler and number of steps have one structure: they may take each other's place under jit."""
    for name in NAMES:
        grids = [jax.tree.map(lambda a: (a.shape, a.dtype), time_grid(SD1, 9, name, s)) for s in (None, *SPACINGS)]
        assert all(g == grids[0] for g in grids), name


@pytest.mark.parametrize(
    ("config", "steps", "name", "spacing", "message"),
    [
        (SD1, 10, "plms", None, "scheduler 'plms' is unknown; known are ddim"),
        (SD1, 10, "ddim", "even", "spacing 'even' is unknown; known are leading"),
        (dataclasses.replace(SD1, timestep_spacing="karras"), 10, "euler", None, "spacing 'karras' is unknown"),
        (SD1, 0, "ddim", None, "steps 0 must be at least 1"),
        (SD1, 1001, "ddpm", "trailing", "steps 1001 is more than trailing spacing"),
        (SD1, 1000, "dpmpp_2m", "linspace", "steps 1000 is more than linspace spacing"),
        (SD1, 1000, "ddim", None, "steps 1000 with steps_offset 1 reach beyond the 1000 of training"),
        (FLOW, 10, "euler", "leading", "does not start from pure noise"),
        (FLOW, 10, "euler", "ays", "a table for Stable Diffusion, not for a flow"),
        (dataclasses.replace(FLOW, use_dynamic_shifting=True), 10, "euler", None, "use_dynamic_shifting"),
        (dataclasses.replace(FLOW, invert_sigmas=True), 10, "heun", None, "invert_sigmas True"),
        (dataclasses.replace(FLOW, shift_terminal=0.02), 10, "unipc", None, "shift_terminal 0.02"),
        (dataclasses.replace(FLOW, stochastic_sampling=True), 10, "euler", None, "stochastic_sampling True"),
        (dataclasses.replace(FLOW, final_sigmas_type="sigma_min"), 10, "unipc", None, "final_sigmas_type 'sigma_min'"),
        (
            dataclasses.replace(CONFIGS["sd2"], timestep_type="continuous"),
            10,
            "euler",
            None,
            "timestep_type 'continuous'",
        ),
        (dataclasses.replace(SD1, interpolation_type="cubic"), 10, "euler", None, "interpolation_type 'cubic'"),
        (dataclasses.replace(SD1, lambda_min_clipped=-2.0), 10, "dpmpp_2m", None, "lambda_min_clipped -2.0"),
        (SchedulerConfig(class_name="EDMEulerScheduler"), 10, "euler", None, "EDMEulerScheduler .* is not supported"),
        (SD1, 51, "lcm", None, "steps 51 is more than the 50 of the distillation"),
        (dataclasses.replace(SD1, original_inference_steps=0), 4, "tcd", None, "original_inference_steps 0 must be"),
        (dataclasses.replace(SD1, final_sigmas_type="half"), 10, "euler", None, "final_sigmas_type 'half' is unknown"),
        (
            dataclasses.replace(SD1, rescale_betas_zero_snr=True),
            10,
            "ddim",
            "trailing",
            r'prediction_type "epsilon" cannot start from pure noise \(alpha = 0\), .*: take spacing "leading", or',
        ),
        (
            EPSILON_FLOW,
            10,
            "euler",
            None,
            r"from pure noise \(alpha = 0\), .*: take the scheduler dpmpp_2m, or a model",
        ),
    ],
)
def test_bad_grids_say_what_is_wrong(config, steps, name, spacing, message):
    with pytest.raises(ValueError, match=message):
        time_grid(config, steps, name, spacing)


def test_ays_is_the_published_table():
    """Levels and times as Sabour et al. 2024 publish both; other numbers of steps lie between its points."""
    published = {
        "ays": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
        "ays_sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    }
    for spacing, t in published.items():
        times, _ = time_grid(SD1, 10, "dpmpp_2m", spacing)
        # Rounded to three digits, levels say the time to some 1e-3 / 0.003.
        np.testing.assert_allclose(times.t[:-1], t, atol=1.5)
        np.testing.assert_allclose(times.sigma[1:-1] / times.alpha[1:-1], AYS[spacing][1:-1], rtol=1e-5)
        double = time_grid(SD1, 20, "dpmpp_2m", spacing)[0]
        np.testing.assert_allclose(double.sigma[2::2], times.sigma[1:], atol=ROUNDING)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_levels_keep_the_ends_of_the_grid(spacing):
    plain, spread = time_grid(SD1, 9, "euler")[0], time_grid(SD1, 9, "euler", spacing)[0]
    for a, b in zip(plain[:3], spread[:3], strict=True):
        np.testing.assert_allclose(a[[0, -2, -1]], b[[0, -2, -1]], rtol=1e-5)


# ---- predictions


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["preserving", "flow", "exploding"])
def test_target_and_denoised_are_inverse(kind, prediction_type):
    """Whatever the process, the network that outputs its target predicts x0; one time a sample, or one for all."""
    x0, eps, times = normal(0, 64, 3, 3, 2), normal(1, 64, 3, 3, 2), random_times(kind, 64)
    for time in (times, Time(*(a[7] for a in times[:3]))):
        x = add_noise(x0, eps, time)
        denoised = to_denoised(target(x0, eps, time, prediction_type), x, time, prediction_type)
        # Rounding of x, up to 40 = 4 sigma of a sigma of 10, over alpha >= 0.05.
        np.testing.assert_allclose(denoised, x0, atol=40 * ROUNDING / 0.05)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ends_of_the_process(prediction_type):
    """At sigma = 0 x is the image; at alpha = 0 all types but epsilon still say what x0 is."""
    x0, eps = normal(0, 5, 4), normal(1, 5, 4)
    for time in (Time(0.0, 1.0, 0.0), Time(1000.0, 0.0, 1.0)):
        if prediction_type == "epsilon" and time.alpha == 0:
            continue
        x = add_noise(x0, eps, time)
        denoised = to_denoised(target(x0, eps, time, prediction_type), x, time, prediction_type)
        np.testing.assert_allclose(denoised, x0, atol=ROUNDING)


def test_v_is_the_velocity_on_the_circle():
    """d x / d angle at fixed x0 and eps: Salimans & Ho 2022, appendix D."""
    x0, eps, angle = normal(0, 3), normal(1, 3), jnp.float32(0.7)
    slope = jax.jacfwd(lambda a: add_noise(x0, eps, vp(a)))(angle)
    np.testing.assert_allclose(target(x0, eps, vp(angle), "v_prediction"), slope, atol=ROUNDING)


def test_flow_is_the_velocity_along_the_line():
    x0, eps, u = normal(0, 3), normal(1, 3), jnp.float32(0.3)
    slope = jax.jacfwd(lambda u: add_noise(x0, eps, Time(u, 1 - u, u)))(u)
    np.testing.assert_allclose(target(x0, eps, Time(u, 1 - u, u), "flow_prediction"), slope, atol=ROUNDING)


def test_unknown_prediction_is_named():
    time = Time(0.0, 1.0, 0.0)
    for call in (lambda: target(0.0, 0.0, time, "noise"), lambda: to_denoised(jnp.ones(1), jnp.ones(1), time, "noise")):
        with pytest.raises(ValueError, match="'noise' is unknown; known are epsilon, sample"):
            call()


def test_guidance():
    cond, uncond = normal(0, 3, 2, 2, 4), normal(1, 3, 2, 2, 4)
    np.testing.assert_allclose(classifier_free(cond, uncond, 1.0), cond, atol=ROUNDING)
    np.testing.assert_array_equal(classifier_free(cond, uncond, 0.0), uncond)  # adds 0 times the rest
    each = classifier_free(cond, uncond, jnp.float32([1.0, 2.0, 7.5]))
    np.testing.assert_allclose(each[2], uncond[2] + 7.5 * (cond[2] - uncond[2]), atol=10 * ROUNDING)
    np.testing.assert_allclose(each[1], 2 * cond[1] - uncond[1], atol=10 * ROUNDING)


# ---- losses


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["preserving", "flow", "exploding"])
def test_min_snr_weighs_the_error_of_x0_alike_for_all_types(kind, prediction_type):
    """The definition in Hang et al. 2023: min(SNR, gamma) on the squared error of x0, however it is predicted."""
    x0, eps, output = normal(0, 64, 5), normal(1, 64, 5), normal(2, 64, 5)
    time = random_times(kind, 64)
    denoised = to_denoised(output, add_noise(x0, eps, time), time, prediction_type)
    expected = jnp.minimum((time.alpha / time.sigma) ** 2, 5.0) * jnp.mean((denoised - x0) ** 2, axis=1)
    loss = diffusion_loss(output, x0, eps, time, prediction_type, min_snr_gamma=5.0)
    # A squared difference of two numbers that are up to 1 / alpha = 20 times larger than it.
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_min_snr_equals_the_published_weights():
    """Variance-preserving: min(SNR, g) / SNR for epsilon, min(SNR, g) / (SNR + 1) for v (section 3.4)."""
    time = random_times("preserving", 50)
    snr = (time.alpha / time.sigma) ** 2
    np.testing.assert_allclose(min_snr_weight(time, "epsilon", 5.0), np.minimum(snr, 5) / snr, rtol=1e-5)
    np.testing.assert_allclose(min_snr_weight(time, "v_prediction", 5.0), np.minimum(snr, 5) / (snr + 1), rtol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_is_finite_at_both_ends(prediction_type):
    ends = Time(jnp.float32([0, 1000]), jnp.float32([1, 0]), jnp.float32([0, 1]))
    weight = min_snr_weight(ends, prediction_type, 5.0)
    expected = {"epsilon": [0, 1], "sample": [5, 0], "v_prediction": [0, 0], "flow_prediction": [0, 0]}
    np.testing.assert_allclose(weight, expected[prediction_type])


def test_loss_is_the_mean_squared_error_of_each_sample():
    x0, eps, time = normal(0, 4, 3, 3, 2), normal(1, 4, 3, 3, 2), random_times("preserving", 4)
    exact = target(x0, eps, time, "v_prediction")
    wrong = exact + jnp.arange(4.0).reshape(4, 1, 1, 1)
    loss = diffusion_loss(wrong.astype(jnp.bfloat16), x0, eps, time, "v_prediction")
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [0, 1, 4, 9], rtol=0.02, atol=1e-4)  # bfloat16 keeps 8 bits
    # The same function of the same arrays, twice.
    np.testing.assert_array_equal(diffusion_loss(exact, x0, eps, time, "v_prediction"), 0)


def test_scheduler_files_take_the_defaults_of_their_class():
    """Checked against the signatures of diffusers' classes."""
    flow = SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert (flow.prediction_type, flow.beta_schedule) == ("flow_prediction", "flow")
    for kind in ("epsilon", "v_prediction", "sample"):  # which diffusers' class does not read
        with pytest.raises(ConfigError, match=f"prediction_type '{kind}' does not go with FlowMatchEulerDiscrete"):
            SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": kind})
        with pytest.raises(ConfigError, match=f"prediction_type '{kind}' does not go with FlowMatchEulerDiscrete"):
            flow.with_prediction_type(kind)
    assert flow.with_prediction_type("flow_prediction") == flow
    heun = SchedulerConfig.from_dict({"_class_name": "HeunDiscreteScheduler", "beta_end": 0.02})
    assert (heun.beta_start, heun.beta_end) == (0.00085, 0.02)
    assert SchedulerConfig.from_dict({"_class_name": "DDIMScheduler"}).beta_start == 1e-4
