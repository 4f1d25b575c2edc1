"""Building blocks of schedulers: state, noise, the DDIM step, clipping of x0. Equation numbers are schedulers.py's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key

Clip = Callable[[Array], Array]


class State(NamedTuple):
    """The state of a single-step scheduler."""

    x: Array  # [B, ...] float32
    denoised: Array  # [B, ...] float32, the prediction of x0 at the last step; x itself before the first


class Scheduler(NamedTuple):
    """A sampling method as two pure functions.

    init(x [B, ...]) -> state.
    step(denoise, state, times, i, keys [B]) -> state: one step, from entry i of the grid `times` (fields [N + 1]) to
        entry i + 1; i may be traced. A state has at least the fields x and denoised.
    start_index(start) -> the entry of the grid whose noise level x must have if the first `start` steps are skipped:
        `start` itself for all but pndm.
    """

    init: Callable[[Array], Any]
    step: Callable[[Denoise, Any, Time, Array, Key], Any]
    start_index: Callable[[Array | int], Array | int] = lambda start: start


def time_at(times: Time, i: Array | int | tuple[Array | int, int]) -> Time:
    """Entry i of a grid, as a time with scalar fields; entry (i, k) of its `substeps`."""
    return Time(times.t[i], times.alpha[i], times.sigma[i])


def step_end(times: Time, i: Array | int) -> Time:
    """The time at which step i ends: entry i + 1, unless the grid has its own `step_end`."""
    return time_at(times, i + 1) if times.step_end is None else time_at(times.step_end, i)


def step_count(times: Time) -> Array | int:
    """N, the number of steps of a grid."""
    return len(times.t) - 1 if times.steps is None else times.steps


def pad_grid(times: Time, steps: int) -> Time:
    """The grid padded to `steps` + 1 entries that are never reached, so that one program serves any number of steps."""
    num_missing = steps + 1 - len(times.t)

    def pad(x: Array) -> np.ndarray:
        return np.concatenate([x, np.repeat(x[-1:], num_missing, 0)])

    return jax.tree.map(pad, times._replace(steps=None))._replace(steps=np.int32(step_count(times)))


def initial(x: Array) -> State:
    """The state before the first step."""
    x = jnp.asarray(x, jnp.float32)
    return State(x, x)


def predict(denoise: Denoise, x: Array, time: Time) -> Array:
    """The prediction of x0, [B, ...] float32."""
    return denoise(x, time).astype(jnp.float32)


def to_eps(x: Array, x0: Array, time: Time) -> Array:
    """eps = (x - alpha x0) / sigma, equation (1): the noise that a prediction of x0 implies."""
    return (x - time.alpha * x0) / time.sigma


def sigma_ratio(time: Time, next_time: Time) -> Array:
    """r = (sigma' / alpha') / (sigma / alpha), equation (2); 0 from pure noise (alpha = 0) and to a clean sample."""
    return time.alpha * next_time.sigma / (next_time.alpha * time.sigma)


def fresh_noise_fraction(time: Time, next_time: Time) -> Array:
    """1 - r^2: the fraction of sigma'^2 that is fresh noise where eta = 1."""
    return jnp.maximum(1 - sigma_ratio(time, next_time) ** 2, 0.0)


def noise_like(keys: Key, x: Array, count: int | None = None) -> Array:
    """Unit Gaussian noise float32 of the shape of x [B, ...], one key a sample; with `count`, [count, B, ...]."""
    if count is None:
        return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)
    return jax.vmap(lambda key: jax.random.normal(key, (count, *x.shape[1:]), jnp.float32), out_axes=1)(keys)


def ddim_step(
    x0: Array, eps: Array, time: Time, next_time: Time, eta: float = 0.0, noise: Array | float = 0.0
) -> Array:
    """x' of equation (3), [B, ...]: the DDIM step.

    Args:
        eta: static, in [0, 1].
        noise: z, [B, ...]; not used if eta is 0.
    """
    if eta == 0:
        return next_time.alpha * x0 + next_time.sigma * eps
    fresh = eta**2 * fresh_noise_fraction(time, next_time)
    return next_time.alpha * x0 + next_time.sigma * (jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * noise)


def clip_to(bound: float) -> Clip:
    """Clips x0 to [-bound, bound], for models of images rather than latents."""
    return lambda x0: jnp.clip(x0, -bound, bound)


def dynamic_threshold(quantile: float = 0.995, max_value: float = 1.0) -> Clip:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): x0 [B, ...] clipped to [-s, s] and divided by s.

    s is a quantile of |x0| of each sample, at least 1 and at most `max_value`.
    """

    def clip(x0: Array) -> Array:
        s = jnp.quantile(jnp.abs(x0), quantile, axis=tuple(range(1, x0.ndim)), keepdims=True)
        s = jnp.clip(s, 1.0, max(max_value, 1.0))
        return jnp.clip(x0, -s, s) / s

    return clip


def with_clipping(scheduler: Scheduler, clip: Clip | None) -> Scheduler:
    """The scheduler with every prediction of x0 clipped; `scheduler` itself if `clip` is None."""
    if clip is None:
        return scheduler

    def step(denoise: Denoise, state: Any, times: Time, i: Array, keys: Key) -> Any:
        return scheduler.step(lambda x, time: clip(predict(denoise, x, time)), state, times, i, keys)

    return scheduler._replace(step=step)
