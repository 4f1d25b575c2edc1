"""Single-step methods: only x passes from one step to the next. Equation numbers are those of schedulers.py."""

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.base import (
    Clip,
    Scheduler,
    State,
    ddim_step,
    fresh_noise_fraction,
    initial,
    noise_like,
    predict,
    sigma_ratio,
    step_end,
    time_at,
    to_eps,
)
from jaxdiff.diffusion.consistency import consistency
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key


def ddim(eta: float = 0.0, clip: Clip | None = None) -> Scheduler:
    """Denoising diffusion implicit models (Song et al. 2021): equation (3).

    Args:
        eta: static, in [0, 1]: 0 is deterministic, 1 adds as much fresh noise as DDPM.
        clip: applied to x0 only; eps is computed from x0 before clipping, as in diffusers.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, next_time = time_at(times, i), step_end(times, i)
        x0 = predict(denoise, state.x, time)
        eps = to_eps(state.x, x0, time)
        x0 = x0 if clip is None else clip(x0)
        noise = noise_like(keys, state.x) if eta else 0.0
        return State(ddim_step(x0, eps, time, next_time, eta, noise), x0)

    return Scheduler(initial, step)


def euler() -> Scheduler:
    """Euler's method on the probability-flow ODE (Karras et al. 2022): equation (3) with eta = 0."""
    return ddim(0.0)


def euler_ancestral() -> Scheduler:
    """k-diffusion's `sample_euler_ancestral` (Crowson 2022): equation (3) with eta = 1."""
    return ddim(1.0)


def ddpm(variance_type: str = "fixed_small") -> Scheduler:
    """Ancestral sampling of the denoising diffusion model (Ho et al. 2020, algorithm 2, for any grid).

    Args:
        variance_type: "fixed_small", the posterior's variance sigma'^2 (1 - r^2), which is equation (3) with eta = 1;
            or "fixed_large", that of a forward step, sigma^2 - (sigma' alpha / alpha')^2.

    Raises:
        ValueError: any other variance_type; learned variances are not supported.
    """
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(f"variance_type {variance_type!r} is unknown; known are fixed_small and fixed_large.")

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, next_time = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        scale = time.sigma if variance_type == "fixed_large" else next_time.sigma
        # As in the paper's algorithm, the step from t = 0 adds no noise.
        spread = jnp.where(time.t > 0, scale * jnp.sqrt(fresh_noise_fraction(time, next_time)), 0.0)
        mean = next_time.alpha * x0 + next_time.sigma * sigma_ratio(time, next_time) * to_eps(state.x, x0, time)
        return State(mean + spread * noise_like(keys, state.x), x0)

    return Scheduler(initial, step)


def heun(flow: bool = False) -> Scheduler:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): equation (4), two network calls a step.

    A step from pure noise (s = 0) or to a clean sample (sigma' = 0) is an Euler step, with one call.

    Args:
        flow: for a rectified flow, s = alpha + sigma and the slope is eps - x0; else s = alpha and the slope is eps.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, next_time = time_at(times, i), time_at(times, i + 1)
        s, next_s = (m.alpha + m.sigma if flow else m.alpha for m in (time, next_time))
        x0 = predict(denoise, state.x, time)
        slope = (state.x - s * x0) / time.sigma
        x = ddim_step(x0, to_eps(state.x, x0, time), time, next_time)

        def average_slopes(x: Array) -> Array:
            next_slope = (x - next_s * predict(denoise, x, next_time)) / next_time.sigma
            return x + (next_time.sigma - time.sigma * next_s / s) * (next_slope - slope) / 2

        x = jax.lax.cond((next_time.sigma > 0) & (s > 0), average_slopes, lambda x: x, x)
        return State(x, x0)

    return Scheduler(initial, step)


def dpmpp_sde() -> Scheduler:
    """k-diffusion's `sample_dpmpp_sde` (Crowson 2022; r = 1/2): equation (3) with eta = 1, twice from the same x.

    The first goes to the midpoint in log(sigma / alpha), the second takes the whole step with the prediction made
    there. Their noises are increments of one Brownian motion over sigma / alpha. A step to a clean sample has one call.

    Raises:
        ValueError: by `step`, if the grid has no `substeps`.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        if times.substeps is None:
            raise ValueError("dpmpp_sde needs the midpoint of each step: make its grid with time_grid.")
        time, next_time = time_at(times, i), time_at(times, i + 1)
        mid = time_at(times.substeps, (i, 0))
        first, second = noise_like(keys, state.x, 2)
        x0 = predict(denoise, state.x, time)

        def two_calls(x: Array) -> Array:
            x_mid = ddim_step(x0, to_eps(x, x0, time), time, mid, 1.0, first)
            x0_mid = predict(denoise, x_mid, mid)
            to_mid, to_next = 1 - sigma_ratio(time, mid), 1 - sigma_ratio(time, next_time)
            noise = jnp.sqrt(to_mid / to_next) * first + jnp.sqrt(1 - to_mid / to_next) * second
            return ddim_step(x0_mid, to_eps(x, x0_mid, time), time, next_time, 1.0, noise)

        x = jax.lax.cond(next_time.sigma > 0, two_calls, lambda x: next_time.alpha * x0, state.x)
        return State(x, x0)

    return Scheduler(initial, step)


def dpmpp_2s_ancestral() -> Scheduler:
    """k-diffusion's `sample_dpmpp_2s_ancestral` (Crowson 2022; eta = 1, r = 1/2): two network calls a step.

    DPM-Solver++(2S) (Lu et al. 2022, algorithm 1) down to noise level r sigma', then fresh noise up to sigma'. The
    midpoint of that step in log(sigma / alpha) is sigma' itself. So the step is: eta = 0 to entry i + 1, a prediction
    there, and with it eta = 1 from the same x. A step to a clean sample has one call.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, next_time = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        noise = noise_like(keys, state.x)
        x = ddim_step(x0, to_eps(state.x, x0, time), time, next_time)

        def second_call(x: Array) -> Array:
            next_x0 = predict(denoise, x, next_time)
            return ddim_step(next_x0, to_eps(state.x, next_x0, time), time, next_time, 1.0, noise)

        return State(jax.lax.cond(next_time.sigma > 0, second_call, lambda x: x, x), x0)

    return Scheduler(initial, step)


def lcm(timestep_scaling: float = 10.0) -> Scheduler:
    """Sampling of latent consistency models (Luo et al. 2023, algorithm 1): predict x0, add fresh noise to it.

    Args:
        timestep_scaling: factor of t in the boundary condition, equation (1) of consistency.py.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, next_time = time_at(times, i), time_at(times, i + 1)
        x0 = consistency(predict(denoise, state.x, time), state.x, time.t, timestep_scaling)
        return State(next_time.alpha * x0 + next_time.sigma * noise_like(keys, state.x), x0)

    return Scheduler(initial, step)


def tcd() -> Scheduler:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4).

    A DDIM step to the grid's `step_end`, whose noise level is below that of entry i + 1, then fresh noise up to that
    entry. `time_grid` sets how far below by the paper's gamma; on a grid without `step_end` no noise is added.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, below, next_time = time_at(times, i), step_end(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        x = ddim_step(x0, to_eps(state.x, x0, time), time, below)
        up = next_time.alpha / below.alpha
        spread = jnp.sqrt(jnp.maximum(next_time.sigma**2 - (up * below.sigma) ** 2, 0.0))
        return State(up * x + spread * noise_like(keys, state.x), x0)

    return Scheduler(initial, step)
