"""The sampling loop, one for all schedulers."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.base import Scheduler, step_count
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key


def sample_keys(key: Key, batch: int) -> Key:
    """One key a sample, [B]: a scalar key is folded with the sample's index, so that sample b does not depend on B.

    Raises:
        ValueError: `key` is neither a scalar nor [batch].
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key has shape {list(key.shape)} for {batch} samples: give one key, or one a sample.")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)) if key.ndim == 0 else key


def step_keys(keys: Key, step: Array | int) -> Key:
    """The keys [B] of a step: each folded with step + 1, since 0 is for the initial noise."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step + 1)


@overload
def sample(
    denoise: Denoise,
    x: Array,
    times: Time,
    scheduler: Scheduler,
    key: Key,
    *,
    start: Array | int | None = None,
    stop: Array | int | None = None,
    trajectory: Literal[False] = False,
) -> Array: ...
@overload
def sample(
    denoise: Denoise,
    x: Array,
    times: Time,
    scheduler: Scheduler,
    key: Key,
    *,
    start: Array | int | None = None,
    stop: Array | int | None = None,
    trajectory: Literal[True],
) -> tuple[Array, Array]: ...
def sample(
    denoise: Denoise,
    x: Array,
    times: Time,
    scheduler: Scheduler,
    key: Key,
    *,
    start: Array | int | None = None,
    stop: Array | int | None = None,
    trajectory: bool = False,
) -> Array | tuple[Array, Array]:
    """Sample from noise to a clean sample: one `lax.scan` over the time grid.

    Everything but `denoise`, `scheduler` and `trajectory` may be traced. The result can be mapped by `vmap`, and
    differentiated with respect to x, `times` and what `denoise` closes over. (On a padded grid, which has
    `times.steps`, it is a `fori_loop` with a traced end, which has no reverse-mode gradient.)

    Args:
        denoise: (x [B, ...], time) -> prediction of x0 [B, ...]; the time's fields are scalars.
        x: [B, ...] at the first time, of standard deviation near 1 (see `time_grid` for its scale); kept in float32.
        times: grid with fields [N + 1], from noise to image, as `time_grid` returns it.
        scheduler: as `get_scheduler` returns it, or your own.
        key: a scalar, or one a sample, [B]. The noise of sample b depends only on its own key, or on the scalar key and
            b, and on the step.
        start: number of steps to skip at the beginning, 0 to N: x must be at times[scheduler.start_index(start)], which
            is times[start] for all but pndm. May be traced.
        stop: index of the step to stop before, 0 to N: the result is at times[stop], from which another network can
            continue with `start`, as SDXL's refiner does after the base model. May be traced.
        trajectory: whether to return the prediction of x0 at each step as well.

    Returns:
        x [B, ...] float32 at the last time reached; with `trajectory`, also the predictions [N, B, ...] (x itself at
        skipped steps).

    Raises:
        ValueError: `key` is neither a scalar nor [B].
    """
    times = jax.tree.map(jnp.asarray, times)
    keys = sample_keys(key, x.shape[0])

    first, end = 0 if start is None else start, step_count(times)
    end = end if stop is None else jnp.minimum(end, stop)

    def step(state, i):
        return scheduler.step(denoise, state, times, i, step_keys(keys, i))

    def scan_step(state, i):
        if start is None and stop is None:
            state = step(state, i)
        else:
            state = jax.lax.cond((i >= first) & (i < end), step, lambda state, i: state, state, i)
        return state, state.denoised if trajectory else None

    def loop_step(i, carry):
        state, denoised = step(carry[0], i), carry[1]
        return state, denoised.at[i].set(state.denoised) if trajectory else None

    state, entries = scheduler.init(x), len(times.t) - 1
    if times.steps is None:
        state, denoised = jax.lax.scan(scan_step, state, jnp.arange(entries))
    else:
        denoised = jnp.broadcast_to(state.denoised, (entries, *x.shape)) if trajectory else None
        state, denoised = jax.lax.fori_loop(first, end, loop_step, (state, denoised))
    return (state.x, denoised) if trajectory else state.x


def advance(
    denoise: Denoise, state: Any, times: Time, scheduler: Scheduler, key: Key, start: Array | int, stop: Array | int
) -> Any:
    """The scheduler's state after steps `start` to `stop` - 1, both of which may be traced: `sample` in pieces.

    >>> from jaxdiff.diffusion.schedulers import ddim
    >>> x, steps = jnp.ones((1, 2)), jnp.linspace(1.0, 0.0, 5)
    >>> times, key, method = Time(1000 * steps, 1 - 0.9 * steps, 0.9 * steps), jax.random.key(0), ddim()
    >>> half = advance(lambda x, time: x / 2, method.init(x), times, method, key, 0, 2)
    >>> end = advance(lambda x, time: x / 2, half, times, method, key, 2, 4)
    >>> bool(jnp.allclose(end.x, sample(lambda x, time: x / 2, x, times, method, key)))
    True
    """
    times = jax.tree.map(jnp.asarray, times)
    keys = sample_keys(key, state.x.shape[0])

    def step(i: Array, state: Any) -> Any:
        return scheduler.step(denoise, state, times, i, step_keys(keys, i))

    return jax.lax.fori_loop(start, stop, step, state)
