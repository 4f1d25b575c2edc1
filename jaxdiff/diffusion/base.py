"""What every sampling method is made of: state, noise, the first-order step, bounds on x0. See schedulers.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key

Clip = Callable[[Array], Array]


class State(NamedTuple):
    """What a scheduler remembers between steps."""

    x: Array  # [B, ...] float32
    denoised: Array  # [B, ...] float32, the prediction of x0 of the step before; x itself before the first


class Scheduler(NamedTuple):
    """A sampling method as two pure functions.

    init(x [B, ...]) -> state, and step(denoise, state, times, i, keys [B]) -> state after step i, from entry i of the
    grid `times` (fields [N + 1]) to entry i + 1; i may be traced. A state has the fields x and denoised at least.
    entry(start) is the entry of the grid whose noise x has where `start` steps are left out: `start`, but for pndm.
    """

    init: Callable[[Array], Any]
    step: Callable[[Denoise, Any, Time, Array, Key], Any]
    entry: Callable[[Array | int], Array | int] = lambda start: start


def time_at(times: Time, i: Array | int | tuple[Array | int, int]) -> Time:
    """Entry i of a grid, as a time with scalar fields; entry (i, k) of its `middle`."""
    return Time(times.t[i], times.alpha[i], times.sigma[i])


def arrival(times: Time, i: Array | int) -> Time:
    """Where step i of a grid arrives: entry i + 1, unless the grid says otherwise."""
    return time_at(times, i + 1) if times.arrival is None else time_at(times.arrival, i)


def initial(x: Array) -> State:
    x = jnp.asarray(x, jnp.float32)
    return State(x, x)


def predict(denoise: Denoise, x: Array, time: Time) -> Array:
    """The prediction of x0, [B, ...] float32."""
    return denoise(x, time).astype(jnp.float32)


def noise_in(x: Array, x0: Array, time: Time) -> Array:
    """eps = (x - alpha x0) / sigma, the noise that a prediction of x0 implies."""
    return (x - time.alpha * x0) / time.sigma


def ratio(time: Time, then: Time) -> Array:
    """r = (sigma' / alpha') / (sigma / alpha); 0 from pure noise (alpha = 0) and to a clean sample (sigma' = 0)."""
    return time.alpha * then.sigma / (then.alpha * time.sigma)


def drawn(time: Time, then: Time) -> Array:
    """1 - r^2, the part of the new noise's variance that eta = 1 draws afresh."""
    return jnp.maximum(1 - ratio(time, then) ** 2, 0.0)


def normal(keys: Key, x: Array, count: int | None = None) -> Array:
    """Unit Gaussian noise like x [B, ...], each sample's from its own key; with a count, as many, [count, B, ...]."""
    if count is None:
        return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)
    return jax.vmap(lambda key: jax.random.normal(key, (count, *x.shape[1:]), jnp.float32), out_axes=1)(keys)


def first_order(x0: Array, eps: Array, time: Time, then: Time, eta: float = 0.0, noise: Array | float = 0.0) -> Array:
    """The step of equation (3) in schedulers.py, [B, ...]; `noise` z is needed where eta is not 0."""
    if eta == 0:
        return then.alpha * x0 + then.sigma * eps
    new = eta**2 * drawn(time, then)
    return then.alpha * x0 + then.sigma * (jnp.sqrt(1 - new) * eps + jnp.sqrt(new) * noise)


def clip_to(bound: float) -> Clip:
    """Bound on |x0|, for models of pictures rather than latents."""
    return lambda x0: jnp.clip(x0, -bound, bound)


def dynamic_threshold(quantile: float = 0.995, largest: float = 1.0) -> Clip:
    """x0 [B, ...] clipped to [-s, s] and divided by s, where s is a quantile of |x0| of each sample (Saharia et al.
    2022, section 2.3), at least 1 and at most `largest`."""

    def clip(x0: Array) -> Array:
        s = jnp.quantile(jnp.abs(x0), quantile, axis=tuple(range(1, x0.ndim)), keepdims=True)
        s = jnp.clip(s, 1.0, max(largest, 1.0))
        return jnp.clip(x0, -s, s) / s

    return clip


def clipped(scheduler: Scheduler, clip: Clip | None) -> Scheduler:
    """The same scheduler, seeing predictions of x0 that are bounded."""
    if clip is None:
        return scheduler

    def step(denoise: Denoise, state: Any, times: Time, i: Array, keys: Key) -> Any:
        return scheduler.step(lambda x, time: clip(predict(denoise, x, time)), state, times, i, keys)

    return scheduler._replace(step=step)
