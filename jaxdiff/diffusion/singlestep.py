"""Methods that forget each step when it is done. Equation numbers are those of schedulers.py."""

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.base import (
    Clip,
    Scheduler,
    State,
    arrival,
    drawn,
    first_order,
    initial,
    noise_in,
    normal,
    predict,
    ratio,
    time_at,
)
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key


def ddim(eta: float = 0.0, clip: Clip | None = None) -> Scheduler:
    """Denoising diffusion implicit models (Song et al. 2021): equation (3).

    Args:
        eta: 0 is deterministic, 1 draws as much noise as DDPM.
        clip: bound on x0; eps stays what the network meant.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = time_at(times, i), arrival(times, i)
        x0 = predict(denoise, state.x, time)
        eps = noise_in(state.x, x0, time)
        x0 = x0 if clip is None else clip(x0)
        noise = normal(keys, state.x) if eta else 0.0
        return State(first_order(x0, eps, time, then, eta, noise), x0)

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
        ValueError: any other variance_type; learned variances are not known here.
    """
    if variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ValueError(f"variance_type {variance_type!r} is unknown; known are fixed_small and fixed_large.")

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        scale = time.sigma if variance_type == "fixed_large" else then.sigma
        # As in the paper's algorithm, nothing is drawn on leaving the first time of training.
        spread = jnp.where(time.t > 0, scale * jnp.sqrt(drawn(time, then)), 0.0)
        mean = then.alpha * x0 + then.sigma * ratio(time, then) * noise_in(state.x, x0, time)
        return State(mean + spread * normal(keys, state.x), x0)

    return Scheduler(initial, step)


def heun(flow: bool = False) -> Scheduler:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): equation (4), two network calls a step.

    Where x / s is infinite (s = 0), and to a clean sample (sigma' = 0), the step is Euler's, with one call.

    Args:
        flow: whether s is alpha + sigma, and the slope a flow's eps - x0; else s is alpha, and the slope eps.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = time_at(times, i), time_at(times, i + 1)
        s, s_then = (m.alpha + m.sigma if flow else m.alpha for m in (time, then))
        x0 = predict(denoise, state.x, time)
        slope = (state.x - s * x0) / time.sigma
        x = first_order(x0, noise_in(state.x, x0, time), time, then)

        def correct(x: Array) -> Array:
            slope_then = (x - s_then * predict(denoise, x, then)) / then.sigma
            return x + (then.sigma - time.sigma * s_then / s) * (slope_then - slope) / 2

        x = jax.lax.cond((then.sigma > 0) & (s > 0), correct, lambda x: x, x)
        return State(x, x0)

    return Scheduler(initial, step)


def dpmpp_sde() -> Scheduler:
    """k-diffusion's `sample_dpmpp_sde` (Crowson 2022; r = 1/2): equation (3) with eta = 1, twice from the same x.

    First to the middle in log(sigma / alpha), then the whole way with the prediction made there. The noises of both
    are increments of one Brownian motion over sigma / alpha. To a clean sample there is one call.

    Raises:
        ValueError: at the first step, of a grid without `middle`.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        if times.middle is None:
            raise ValueError("dpmpp_sde needs the middle of each step: give it a grid that time_grid has made for it.")
        time, then = time_at(times, i), time_at(times, i + 1)
        mid = time_at(times.middle, (i, 0))
        first, second = normal(keys, state.x, 2)
        x0 = predict(denoise, state.x, time)

        def whole(x: Array) -> Array:
            x_mid = first_order(x0, noise_in(x, x0, time), time, mid, 1.0, first)
            x0_mid = predict(denoise, x_mid, mid)
            to_mid, to_then = 1 - ratio(time, mid), 1 - ratio(time, then)
            noise = jnp.sqrt(to_mid / to_then) * first + jnp.sqrt(1 - to_mid / to_then) * second
            return first_order(x0_mid, noise_in(x, x0_mid, time), time, then, 1.0, noise)

        x = jax.lax.cond(then.sigma > 0, whole, lambda x: then.alpha * x0, state.x)
        return State(x, x0)

    return Scheduler(initial, step)


def dpmpp_2s_ancestral() -> Scheduler:
    """k-diffusion's `sample_dpmpp_2s_ancestral` (Crowson 2022; eta = 1, r = 1/2): two network calls a step.

    DPM-Solver++(2S) (Lu et al. 2022, algorithm 1) down to the level r sigma', from where noise leads up to sigma'. The
    middle of that way in log(sigma / alpha) is sigma' itself, so that the step is: eta = 0 for a look at entry i + 1,
    then eta = 1 from the same x with the prediction made there. To a clean sample there is one call.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        noise = normal(keys, state.x)
        x = first_order(x0, noise_in(state.x, x0, time), time, then)

        def again(x: Array) -> Array:
            x0_then = predict(denoise, x, then)
            return first_order(x0_then, noise_in(state.x, x0_then, time), time, then, 1.0, noise)

        return State(jax.lax.cond(then.sigma > 0, again, lambda x: x, x), x0)

    return Scheduler(initial, step)


def lcm(timestep_scaling: float = 10.0) -> Scheduler:
    """Sampling of latent consistency models (Luo et al. 2023, algorithm 1): predict x0, add new noise to it.

    Args:
        timestep_scaling: factor of t in the boundary condition, equation (8) of the paper with sigma_data = 1/2.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, then = time_at(times, i), time_at(times, i + 1)
        scaled = time.t * timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / jnp.sqrt(scaled**2 + 0.25)
        x0 = out * predict(denoise, state.x, time) + skip * state.x
        return State(then.alpha * x0 + then.sigma * normal(keys, state.x), x0)

    return Scheduler(initial, step)


def tcd() -> Scheduler:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, algorithm 4).

    A first-order step to the grid's `arrival`, below entry i + 1, then new noise up to it. How far below is the gamma
    of the paper, which `time_grid` knows; a grid that says nothing of it is followed without noise.
    """

    def step(denoise: Denoise, state: State, times: Time, i: Array, keys: Key) -> State:
        time, below, then = time_at(times, i), arrival(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        x = first_order(x0, noise_in(state.x, x0, time), time, below)
        up = then.alpha / below.alpha
        spread = jnp.sqrt(jnp.maximum(then.sigma**2 - (up * below.sigma) ** 2, 0.0))
        return State(up * x + spread * normal(keys, state.x), x0)

    return Scheduler(initial, step)
