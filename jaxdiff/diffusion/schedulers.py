"""Schedulers: from the noise at one time to a little less noise at the next.

They see a network only as denoise(x, time) -> x0, and a process only as x = alpha x0 + sigma eps, so that each serves
variance-preserving, variance-exploding, zero-terminal-SNR and flow models alike. Primes mark the time arrived at.

    eps = (x - alpha x0) / sigma                         the noise that a prediction of x0 implies              (1)
    r = (sigma' / alpha') / (sigma / alpha)              ratio of the noise-to-signal levels, in [0, 1]         (2)

All first-order steps are one formula, with noise z and eta in [0, 1] (Song et al. 2021, DDIM, equations 12 and 16):

    x' = alpha' x0 + sigma' sqrt(1 - eta^2 (1 - r^2)) eps + sigma' eta sqrt(1 - r^2) z                          (3)

eta = 0 is DDIM, and is Euler's method for dx~/dsigma~ = eps in x~ = x / alpha, sigma~ = sigma / alpha (Karras et al.
2022, equation 3 with sigma = t). eta = 1 is the ancestral sampling of DDPM (Ho et al. 2020, equation 7) and
k-diffusion's Euler ancestral. They differ in their time grids, in clipping and in the variance of the noise.

Heun's method (Karras et al. 2022, algorithm 1) averages eps over both ends of the step in x~,

    x' = alpha' x0 + sigma' (eps + eps') / 2 + sigma (alpha' / alpha) (eps - eps') / 2                          (4)

and DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) takes (3) with eta = 0 at a prediction carried half a step onward,

    D = x0 + h / (2 h_last) (x0 - x0_last),   h = lambda' - lambda,   lambda = log(alpha / sigma)               (5)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key


class State(NamedTuple):
    """What a scheduler remembers between steps."""

    x: Array  # [B, ...] float32
    denoised: Array  # [B, ...] float32, the prediction of x0 of the step before; x itself before the first
    taken: Array  # [] int32, steps taken


class Scheduler(NamedTuple):
    """A sampling method as two pure functions.

    init(x [B, ...]) -> state, and step(denoise, state, times, i, keys [B]) -> state after step i, from entry i of the
    grid `times` (fields [N + 1]) to entry i + 1; i may be traced. A state has the fields x and denoised at least.
    """

    init: Callable[[Array], Any]
    step: Callable[[Denoise, Any, Time, Array, Key], Any]


def moment(times: Time, i: Array | int) -> Time:
    """Entry i of a grid, as a time with scalar fields."""
    return Time(times.t[i], times.alpha[i], times.sigma[i])


def _init(x: Array) -> State:
    x = jnp.asarray(x, jnp.float32)
    return State(x, x, jnp.int32(0))


def _clip(x0: Array, clip_range: float | None) -> Array:
    return x0 if clip_range is None else jnp.clip(x0, -clip_range, clip_range)


def _eps(x: Array, x0: Array, time: Time) -> Array:
    """Equation (1)."""
    return (x - time.alpha * x0) / time.sigma


def _ratio(time: Time, then: Time) -> Array:
    """Equation (2); 0 from pure noise (alpha = 0) and to a clean sample (sigma' = 0)."""
    return time.alpha * then.sigma / (then.alpha * time.sigma)


def _drawn(time: Time, then: Time) -> Array:
    """1 - r^2, the part of the new noise's variance that eta = 1 draws afresh."""
    return jnp.maximum(1 - _ratio(time, then) ** 2, 0.0)


def _normal(keys: Key, x: Array) -> Array:
    """Unit Gaussian noise like x [B, ...], each sample's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


def _ancestral(eta: float, clip_range: float | None = None) -> Scheduler:
    """Equation (3); clipping of x0 leaves eps as the network meant it, as diffusers' DDIM does."""

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time = moment(times, i)
        then = moment(times, i + 1) if times.arrival is None else moment(times.arrival, i)
        x0 = denoise(state.x, time).astype(jnp.float32)
        eps = _eps(state.x, x0, time)
        x0 = _clip(x0, clip_range)
        if eta == 0:
            x = then.alpha * x0 + then.sigma * eps
        else:
            drawn = eta**2 * _drawn(time, then)
            x = then.alpha * x0 + then.sigma * (jnp.sqrt(1 - drawn) * eps + jnp.sqrt(drawn) * _normal(keys, state.x))
        return State(x, x0, state.taken + 1)

    return Scheduler(_init, step)


def ddim(eta: float = 0.0, clip_range: float | None = None) -> Scheduler:
    """Denoising diffusion implicit models (Song et al. 2021): equation (3).

    Args:
        eta: 0 is deterministic, 1 draws as much noise as DDPM.
        clip_range: bound on |x0|, for models of pictures rather than latents; None leaves x0 alone.
    """
    return _ancestral(eta, clip_range)


def ddpm(variance_type: str = "fixed_small", clip_range: float | None = None) -> Scheduler:
    """Ancestral sampling of the denoising diffusion model (Ho et al. 2020, algorithm 2, for any grid).

    Args:
        variance_type: "fixed_small", the posterior's variance sigma'^2 (1 - r^2), which is equation (3) with eta = 1;
            or "fixed_large", that of a forward step, sigma^2 - (sigma' alpha / alpha')^2.
        clip_range: bound on |x0|, and with it on the mean.

    Raises:
        ValueError: any other variance_type; learned variances are not known here.
    """
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(f"variance_type {variance_type!r} is unknown; known are fixed_small and fixed_large.")

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = moment(times, i), moment(times, i + 1)
        x0 = _clip(denoise(state.x, time).astype(jnp.float32), clip_range)
        scale = time.sigma if variance_type == "fixed_large" else then.sigma
        # As in the paper's algorithm, nothing is drawn on leaving the first time of training.
        drawn = jnp.where(time.t > 0, scale * jnp.sqrt(_drawn(time, then)), 0.0)
        mean = then.alpha * x0 + then.sigma * _ratio(time, then) * _eps(state.x, x0, time)
        x = mean + drawn * _normal(keys, state.x)
        return State(x, x0, state.taken + 1)

    return Scheduler(_init, step)


def euler() -> Scheduler:
    """Euler's method on the probability-flow ODE (Karras et al. 2022): equation (3) with eta = 0."""
    return _ancestral(0.0)


def euler_ancestral() -> Scheduler:
    """k-diffusion's `sample_euler_ancestral` (Crowson 2022): equation (3) with eta = 1."""
    return _ancestral(1.0)


def heun(clip_range: float | None = None) -> Scheduler:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): equation (4), two network calls a step.

    From pure noise (alpha = 0) and to a clean sample (sigma' = 0) the step is Euler's, with one call.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = moment(times, i), moment(times, i + 1)
        x0 = _clip(denoise(state.x, time).astype(jnp.float32), clip_range)
        eps = _eps(state.x, x0, time)
        x = then.alpha * x0 + then.sigma * eps

        def correct(x: Array) -> Array:
            x0_then = _clip(denoise(x, then).astype(jnp.float32), clip_range)
            half = (_eps(x, x0_then, then) - eps) / 2
            return x + (then.sigma - time.sigma * then.alpha / time.alpha) * half

        x = jax.lax.cond((then.sigma > 0) & (time.alpha > 0), correct, lambda x: x, x)
        return State(x, x0, state.taken + 1)

    return Scheduler(_init, step)


def dpmpp_2m(lower_order_final: bool = True, euler_at_final: bool = False) -> Scheduler:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): equation (5), one network call a step.

    The first step, and the last where it ends in a clean sample (sigma' = 0), are of first order.

    Args:
        lower_order_final: whether the last of fewer than 15 steps is of first order as well.
        euler_at_final: whether the last step always is.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        steps = len(times.t) - 1
        last, time, then = moment(times, jnp.maximum(i - 1, 0)), moment(times, i), moment(times, i + 1)
        x0 = denoise(state.x, time).astype(jnp.float32)
        second = (state.taken > 0) & (then.sigma > 0)
        if euler_at_final or (lower_order_final and steps < 15):
            second &= i < steps - 1
        # h / h_last = log r / log r_last; a step from pure noise has h_last infinite and tells nothing of the slope.
        onward = jnp.where(second, jnp.log(_ratio(time, then)) / jnp.log(_ratio(last, time)), 0.0)
        ahead = x0 + onward / 2 * (x0 - state.denoised)
        x = then.alpha * ahead + then.sigma * _eps(state.x, ahead, time)
        return State(x, x0, state.taken + 1)

    return Scheduler(_init, step)


SCHEDULERS: dict[str, Callable[..., Scheduler]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def get_scheduler(name: str, config: SchedulerConfig | None = None) -> Scheduler:
    """The scheduler of this name, with the options that diffusers' class of it reads from a config.

    Those are the clipping of x0 (ddim, ddpm, heun), the variance (ddpm) and the order at the end (dpmpp_2m). A missing
    `clip_sample` is true for ddim and ddpm, false for heun; the others never clip. Without a config nothing is clipped.

    Raises:
        ValueError: an unknown name, or an option of the config that is not implemented.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown; known are {', '.join(SCHEDULERS)}.")
    if config is None:
        return SCHEDULERS[name]()
    if config.thresholding:
        raise ValueError("thresholding (scheduler_config.json) is not implemented: set it to false.")
    clips = name in ("ddim", "ddpm") if config.clip_sample is None else config.clip_sample
    options: dict[str, Any] = {}
    if name in ("ddim", "ddpm", "heun"):
        options["clip_range"] = config.clip_sample_range if clips else None
    if name == "ddpm":
        options["variance_type"] = config.variance_type or "fixed_small"
    if name == "dpmpp_2m":
        options |= {"lower_order_final": config.lower_order_final, "euler_at_final": config.euler_at_final}
    return SCHEDULERS[name](**options)
