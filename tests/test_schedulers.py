"""Each scheduler solves what it claims to solve: a Gaussian's exact answer, at the method's order.

For x0 ~ N(m, s^2) the best prediction and the probability-flow ODE have closed forms. With V = alpha^2 s^2 + sigma^2,

    denoise(x) = m + alpha s^2 (x - alpha m) / V,        (x - alpha m) / sqrt(V) is constant along the ODE.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.base import clip_to, dynamic_threshold, noise_like
from jaxdiff.diffusion.multistep import CONSTANT_WEIGHT, _phi, _weights, dpmpp_2m, lms, pndm, unipc
from jaxdiff.diffusion.sampling_loop import sample, sample_keys, step_keys
from jaxdiff.diffusion.schedulers import SCHEDULERS, get_scheduler
from jaxdiff.diffusion.schedules import Time, noise_schedule
from jaxdiff.diffusion.singlestep import ddim, ddpm, heun
from jaxdiff.diffusion.times import time_grid
from tests.support.scheduler_cases import FLOW, NAMES, SD1, ZERO_SNR

MEAN, SPREAD = 0.7, 0.4
# Methods and their orders. A single step of low order at the start costs one order less than a whole path of them: the
# order of lms and pndm (of 4 once under way) is 2 at worst. UniPC's corrector adds one to its predictor's.
METHODS = {
    "ddim": (ddim(), 1),
    "euler": (SCHEDULERS["euler"](), 1),
    "heun": (heun(), 2),
    "heun of a flow": (heun(flow=True), 2),
    "dpmpp_2m": (dpmpp_2m(), 2),
    "dpmpp_2m heun": (dpmpp_2m(solver_type="heun"), 2),
    "lms": (lms(), 2),
    "pndm": (pndm(), 2),
    "unipc": (unipc(lower_order_final=False), 3),
    "unipc bh1": (unipc(solver_type="bh1", lower_order_final=False), 3),
    "unipc of order 1": (unipc(1), 2),
    "unipc of eps": (unipc(prediction_type="epsilon", lower_order_final=False), 3),
}
EXCEEDING = ("lms", "unipc", "unipc bh1", "unipc of order 1", "unipc of eps")  # slopes from just under the order up
DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp_2m", "lms", "pndm", "unipc")
STOCHASTIC = {"ddpm": ddpm, "euler_ancestral": SCHEDULERS["euler_ancestral"], "ddim eta 1": lambda: ddim(1.0)}


def variance(alpha, sigma):
    return alpha**2 * SPREAD**2 + sigma**2


def denoise(x, time):
    return MEAN + time.alpha * SPREAD**2 * (x - time.alpha * MEAN) / variance(time.alpha, time.sigma)


def exact(x, times: Time):
    """The solution of the ODE at the end of the grid, from x at its beginning."""
    first, last = (Time(*(np.float64(a[i]) for a in times[:3])) for i in (0, -1))
    scale = np.sqrt(variance(last.alpha, last.sigma) / variance(first.alpha, first.sigma))
    return last.alpha * MEAN + scale * (np.float64(x) - first.alpha * MEAN)


def smooth_grid(kind: str, steps: int) -> Time:
    """Grids that get finer everywhere as N grows, with neither pure noise nor a clean sample at their ends."""
    u = np.linspace(0.95, 0.05, steps + 1)
    if kind == "flow":
        return Time(np.float32(1000 * u), np.float32(1 - u), np.float32(u))
    if kind == "exploding":
        return Time(np.float32(1000 * u), np.ones(steps + 1, np.float32), np.float32(10 ** (3 * u - 2)))
    return Time(np.float32(1000 * u), np.float32(np.cos(u * np.pi / 2)), np.float32(np.sin(u * np.pi / 2)))


@functools.cache
def program(scheduler):
    """(x, times) -> x at the end of the grid, compiled once for all grids of a length."""
    return jax.jit(lambda x, times: sample(denoise, x, times, scheduler, jax.random.key(0)))


def error(scheduler, times: Time) -> float:
    """Largest error at the end, over starts spread as noise is."""
    x = np.linspace(-2, 2, 9, dtype=np.float32)[:, None] * times.sigma[0]
    return float(np.abs(program(scheduler)(x, times) - exact(x, times)).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_order_of_convergence(name):
    """Twice the steps divide the error by 2**order; halving 3 times over, the slope is seen to a tenth or two."""
    scheduler, order = METHODS[name]
    for kind in ("preserving", "flow", "exploding"):
        # from 15 steps on, dpmpp_2m keeps its order to the end
        few, many = (error(scheduler, smooth_grid(kind, n)) for n in (16, 128))
        slope = np.log2(few / many) / 3
        assert slope > order - (0.45 if name in EXCEEDING else 0.25), (kind, slope, few, many)
        assert slope < order + 0.25 or name in EXCEEDING, (kind, slope, few, many)
        assert many < 0.03 / 10 ** (order - 1), kind


@pytest.mark.slow
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_real_grids_converge(name):
    """From noise, or pure noise, to a clean sample, where every method's last step is of first order."""
    usual = METHODS[name][0] if name != "unipc" else SCHEDULERS["unipc"]()
    for config in (SD1, ZERO_SNR, FLOW):
        own = (name == "heun" and config is FLOW) or (name == "pndm" and config is not SD1)
        scheduler = get_scheduler(name, dataclasses.replace(config, clip_sample=False)) if own else usual
        few, many = (error(scheduler, time_grid(config, n, name, "trailing")[0]) for n in (25, 100))
        rounding = 3e-5  # a hundred steps of float32
        assert many < max(few / 1.5**2, rounding)
        assert many < 0.04


def test_dpmpp_2m_ends_at_first_order_where_told():
    """The last step is DDIM's with under 15 steps (unless told otherwise), or with `euler_at_final`."""

    def last_step(steps, scheduler):
        times = jax.tree.map(jnp.asarray, smooth_grid("preserving", steps))
        step = jax.jit(lambda state, i: scheduler.step(denoise, state, times, i, jax.random.key(0)[None]))
        states = [scheduler.init(jnp.full((1, 1), 0.5))]
        for i in range(steps):
            states.append(step(states[-1], i))
        last = ddim().step(denoise, states[-2], times, steps - 1, None)
        return bool(jnp.allclose(states[-1].x, last.x, atol=1e-6))  # x is near 0.7: a unit in the last place is 6e-8

    assert last_step(14, dpmpp_2m())
    assert not last_step(15, dpmpp_2m())
    assert not last_step(14, dpmpp_2m(lower_order_final=False))
    assert last_step(15, dpmpp_2m(euler_at_final=True))


def chain(times: Time, fixed_large: bool = False) -> tuple[float, float]:
    """Mean and standard deviation at the end of the ancestral chain, from x_T ~ N(alpha m, V): it is linear in x.

    By the posterior q(x' | x, x0) at x0 = denoise(x), Ho et al. 2020, equations 6 and 7, for any alpha and sigma:
    mean = (a sigma'^2 x + alpha' b x0) / sigma^2 with a = alpha / alpha' and b = sigma^2 - a^2 sigma'^2.
    """
    t, alpha, sigma = (np.float64(a) for a in times[:3])
    mean, var = alpha[0] * MEAN, variance(alpha[0], sigma[0])
    for i in range(len(alpha) - 1):
        a = alpha[i] / alpha[i + 1]
        b = sigma[i] ** 2 - a**2 * sigma[i + 1] ** 2
        gain = alpha[i] * SPREAD**2 / variance(alpha[i], sigma[i])  # denoise(x) = gain x + offset
        offset = MEAN * (1 - gain * alpha[i])
        slope = (a * sigma[i + 1] ** 2 + alpha[i + 1] * b * gain) / sigma[i] ** 2
        fresh = (b if fixed_large else b * sigma[i + 1] ** 2 / sigma[i] ** 2) * (t[i] > 0)
        mean = slope * mean + alpha[i + 1] * b * offset / sigma[i] ** 2
        var = slope**2 * var + fresh
    return mean, var**0.5


def ends(times: Time, scheduler, count: int = 40_000) -> np.ndarray:
    """Many samples at the end of a grid, from x_T ~ N(alpha m, V)."""
    x = jax.random.normal(jax.random.key(3), (count, 1)) * variance(times.alpha[0], times.sigma[0]) ** 0.5
    return np.asarray(program(scheduler)(x + times.alpha[0] * MEAN, times))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_schedulers_draw_the_chain(name):
    """The samples' mean and spread are those of the chain, to five standard errors."""
    scheduler = STOCHASTIC[name]()
    for config in (SD1, ZERO_SNR, FLOW):
        times = time_grid(config, 12, "ddpm", "trailing")[0]
        x = ends(times, scheduler)
        mean, spread = chain(times)
        assert abs(x.mean() - mean) < 5 * spread / len(x) ** 0.5
        assert abs(x.std() - spread) < 5 * spread / (2 * len(x)) ** 0.5


def test_ddpm_with_the_large_variance():
    times = time_grid(SD1, 12, "ddpm", "trailing")[0]
    x = ends(times, ddpm("fixed_large"))
    mean, spread = chain(times, fixed_large=True)
    assert abs(x.mean() - mean) < 5 * spread / len(x) ** 0.5
    assert abs(x.std() - spread) < 5 * spread / (2 * len(x)) ** 0.5
    assert spread > 1.02 * chain(times)[1]  # 5 standard errors are 0.018


def test_ddpm_adds_no_noise_on_leaving_the_first_training_time():
    """As in the paper's algorithm, also with the large variance; the step before adds some."""
    times = jax.tree.map(jnp.asarray, time_grid(SD1, 12, "ddpm", "linspace")[0])
    scheduler, x, keys = ddpm("fixed_large"), jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)
    for i, noisy in ((10, True), (11, False)):
        with jax.disable_jit():
            a, b = (scheduler.step(denoise, scheduler.init(x), times, i, k).x for k in (keys, keys[::-1]))
        assert bool(jnp.abs(a - b).max() > 1e-3) == noisy
        assert noisy or float(times.t[i]) == 0


def test_chain_converges_to_the_distribution():
    """At first order in the number of steps: what the test above measures is right in the limit."""
    errors = [abs(chain(smooth_end(n))[1] - SPREAD) for n in (50, 100, 200)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, atol=0.2)


def smooth_end(steps: int) -> Time:
    """From almost pure noise to a clean sample."""
    u = np.linspace(1, 0, steps + 1) * 0.999 * np.pi / 2
    return Time(u, np.cos(u), np.sin(u))


def test_eta_goes_from_ddim_to_ddpm():
    """Half-way eta keeps the distribution too; its noise is between none and all."""
    times = smooth_end(100)
    spreads = [ends(times, ddim(eta), 20_000).std() for eta in (0.0, 0.5, 1.0)]
    # The chain's own error at 100 steps, plus five standard errors of 0.4 / sqrt(2 20000) = 0.002.
    np.testing.assert_allclose(spreads, SPREAD, atol=0.012 + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s_ancestral"])
def test_stochastic_schedulers_draw_the_distribution(name):
    """A hundred steps from noise, or pure noise, end in the target, to a first-order bias and five standard errors."""
    scheduler = SCHEDULERS[name]()
    for config in (SD1, FLOW):
        x = ends(time_grid(config, 100, name, "trailing")[0], scheduler, 20_000)
        # As large as the bias of 0.012 that the ancestral chain has at 100 steps (see below); and 0.4 / sqrt(20000).
        assert abs(x.mean() - MEAN) < 0.012 + 5 * SPREAD / 20_000**0.5
        assert abs(x.std() - SPREAD) < 0.012 + 5 * SPREAD / 40_000**0.5


def test_tcd_draws_its_chain():
    """Down to floor(0.7 t') by the first-order step, up to t' by noise: the chain is linear, its end known."""
    times = time_grid(SD1, 8, "tcd")[0]
    alpha, sigma = (np.float64(a) for a in times[1:3])
    below = np.floor(0.7 * times.t[1:]).astype(int)
    table = [np.float64(a)[below] for a in noise_schedule(SD1)]
    mean, var = alpha[0] * MEAN, variance(alpha[0], sigma[0])
    for i, (low, high) in enumerate(zip(*table, strict=True)):
        gain = alpha[i] * SPREAD**2 / variance(alpha[i], sigma[i])  # denoise(x) = gain x + offset
        offset = MEAN * (1 - gain * alpha[i])
        up, slope = alpha[i + 1] / low, low * gain + high * (1 - alpha[i] * gain) / sigma[i]
        mean = up * (slope * mean + (low - high * alpha[i] / sigma[i]) * offset)
        var = (up * slope) ** 2 * var + 1 - up**2
    x = ends(times, SCHEDULERS["tcd"]())
    assert abs(x.mean() - mean) < 5 * (var / len(x)) ** 0.5
    assert abs(x.std() - var**0.5) < 5 * (var / (2 * len(x))) ** 0.5


@pytest.mark.parametrize("steps", [1, 4])
def test_lcm_of_a_consistency_function_draws_the_distribution(steps):
    """The exact one, x to the end of its path in one step, makes every number of steps exact."""

    def consistency(x, time):
        return MEAN + SPREAD * (x - time.alpha * MEAN) / variance(time.alpha, time.sigma) ** 0.5

    times = time_grid(SD1, steps, "lcm")[0]
    x = jax.random.normal(jax.random.key(3), (40_000, 1)) * variance(times.alpha[0], times.sigma[0]) ** 0.5
    x = sample(consistency, x + times.alpha[0] * MEAN, times, SCHEDULERS["lcm"](), jax.random.key(4))
    assert abs(x.mean() - MEAN) < 5 * SPREAD / 40_000**0.5
    assert abs(x.std() - SPREAD) < 5 * SPREAD / 80_000**0.5


def test_dpmpp_2s_ancestral_is_the_published_algorithm():
    """k-diffusion's loop in its own variables, x / alpha and sigma / alpha, in float64, on the same noise."""
    times = time_grid(SD1, 9, "dpmpp_2s_ancestral")[0]
    scheduler, start = SCHEDULERS["dpmpp_2s_ancestral"](), jax.random.normal(jax.random.key(1), (5, 2))
    key, sigmas = jax.random.key(2), np.float64(times.sigma) / np.float64(times.alpha)

    def model(x, sigma):
        alpha = 1 / np.sqrt(1 + sigma**2)
        return np.tanh(0.8 * alpha * x) + 0.1 * np.sin(sigma)

    x = np.float64(start) * sigmas[0]
    for i in range(9):
        sigma, end, denoised = sigmas[i], sigmas[i + 1], model(x, sigmas[i])
        up = min(end, np.sqrt(end**2 * (sigma**2 - end**2) / sigma**2))
        down = np.sqrt(max(end**2 - up**2, 0))
        if down == 0:
            x = x + (x - denoised) / sigma * (down - sigma)
        else:
            t, t_next = -np.log(sigma), -np.log(down)
            half = (t_next - t) / 2
            middle = np.exp(-(t + half))
            x_2 = middle / sigma * x - np.expm1(-half) * denoised
            x = down / sigma * x - np.expm1(-2 * half) * model(x_2, middle)
        x = x + up * np.float64(noise_like(step_keys(sample_keys(key, 5), i), start))

    def denoise(x, time):
        return jnp.tanh(0.8 * x) + 0.1 * jnp.sin(time.sigma / time.alpha)

    # x / alpha begins at 15, in float32: 9 steps of 2**-24 of that.
    with jax.disable_jit():
        end = sample(denoise, times.sigma[0] * start, times, scheduler, key)
    np.testing.assert_allclose(end, x, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_is_the_configs(name):
    """Bound on x0 for the classes that have one, whatever the range; none without a config."""
    config = SD1.__class__(clip_sample=True, clip_sample_range=0.25)
    times = Time(jnp.float32([900, 0]), jnp.float32([0.2, 1]), jnp.float32([0.98, 0]))
    times = times._replace(substeps=Time(*(a[:1, None] for a in times[:3])))

    def end(scheduler):
        with jax.disable_jit():
            x = sample(lambda x, time: 2 + 0 * x, jnp.zeros((1, 1)), times, scheduler, jax.random.key(0))
        return float(x[0, 0])

    assert end(get_scheduler(name, config)) == pytest.approx(0.25 if name in ("ddim", "ddpm", "heun", "lcm") else 2)
    assert end(get_scheduler(name)) == pytest.approx(2)


def test_ddim_clips_x0_and_not_eps():
    """eps is computed before clipping: x' = alpha' clip(x0) + sigma' eps."""
    times = Time(jnp.float32([900, 400]), jnp.float32([0.6, 0.8]), jnp.float32([0.8, 0.6]))
    with jax.disable_jit():
        end = sample(lambda x, time: 3 + 0 * x, jnp.ones((1, 1)), times, ddim(clip=clip_to(1.0)), jax.random.key(0))
    np.testing.assert_allclose(end, 0.8 * 1 + 0.6 * (1 - 0.6 * 3) / 0.8, rtol=1e-6)


def test_dynamic_thresholding_is_each_samples_own():
    """A quantile of |x0|, at least 1 and at most the largest allowed, becomes 1."""
    x0 = jnp.float32([[0.5, -0.2, 0.1], [4.0, -2.0, 1.0], [40.0, 30.0, 20.0]])
    expected = [[0.5, -0.2, 0.1], [1.0, -1.0, 0.5], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(dynamic_threshold(0.5, 9.0)(x0), expected, rtol=1e-6)


def test_weights_are_those_of_the_published_tables():
    """Adams and Bashforth's, on steps of one length."""
    places, moments = [0.0, -1.0, -2.0, -3.0], CONSTANT_WEIGHT
    published = [[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]
    for order, weights in enumerate(published, 1):
        np.testing.assert_allclose(_weights(order, places, moments), np.divide(weights, 24), rtol=1e-5, atol=1e-6)


def test_phi_is_accurate_at_any_step():
    """The series and the closed forms, against the integrals: phi_n(k) = int_0^1 e^((1-u) k) u^(n-1) / (n-1)! du."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    u = (nodes + 1) / 2
    for k in (-30.0, -3.0, -1.0, -0.99, -1e-3, 1e-3, 0.5, 1.0, 2.0):
        exact = [np.sum(weights / 2 * np.exp((1 - u) * k) * u ** (n - 1)) / math.factorial(n - 1) for n in range(1, 5)]
        np.testing.assert_allclose(_phi(jnp.float32(k)), exact, rtol=1e-5)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="scheduler 'plms' is unknown; known are ddim, ddpm"):
        get_scheduler("plms")
    with pytest.raises(ValueError, match="variance_type 'learned' is unknown"):
        get_scheduler("ddpm", SD1.__class__(variance_type="learned"))
    for name in ("dpmpp_2m", "unipc"):
        with pytest.raises(ValueError, match="solver_order 4 must be 1, 2 or 3"):
            get_scheduler(name, SD1.__class__(solver_order=4))
        with pytest.raises(ValueError, match="solver_type 'bh3' is unknown; known are "):
            SCHEDULERS[name](solver_type="bh3")
        with pytest.raises(ValueError, match="prediction_type 'v_prediction' cannot be averaged"):
            SCHEDULERS[name](prediction_type="v_prediction")
    with pytest.raises(ValueError, match='"sde-dpmsolver" is refused'):
        get_scheduler("dpmpp_2m", SD1.__class__(algorithm_type="sde-dpmsolver"))
    with pytest.raises(ValueError, match='"dpmsolver" needs final_sigmas_type "sigma_min"'):
        get_scheduler("dpmpp_2m", SD1.__class__(algorithm_type="dpmsolver"))
    with pytest.raises(ValueError, match="dpmpp_sde needs the midpoint of each step"):
        sample(denoise, jnp.ones((1, 1)), smooth_grid("flow", 4), SCHEDULERS["dpmpp_sde"](), jax.random.key(0))
    get_scheduler("ddim", SD1.__class__(variance_type="learned"))  # ddpm's affair alone
