"""The state of training and one step of it as a pure function."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from jaxdiff import parallel
from jaxdiff.training.optimizer import learning_rate, optimizer
from jaxdiff.training.options import Options
from jaxdiff.typing import PRNG, Array, Key, Params

Batch = Mapping[str, Any]  # arrays [B, ...] by name
Metrics = Mapping[str, Array]  # scalars by name
# (all parameters, batch, keys [B], one an example) -> (mean loss over the batch, metrics)
Loss = Callable[[Params, Batch, Key], tuple[Array, Metrics]]
Dtypes = Mapping[str, Any]  # types that networks compute in, by the keys of their parameters
NO_CAST: Dtypes = MappingProxyType({})
STATE = "train_state"  # key of the parameters that holds the state for a stage with `reads_state`


class TrainState(NamedTuple):
    step: Array  # [] int32, updates made
    params: Params  # trained parameters, float32
    ema: Params  # their moving average
    opt_state: Any


def ema_update(ema: Params, params: Params, decay: float, step: Array) -> Params:
    """ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), `step` counted from 0.

    The smaller decay of the first steps lets the average forget the random start.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)


def cast_frozen(frozen: Params, options: Options) -> Params:
    """Frozen parameters in `options.frozen_dtype`. Integers and floats that are no wider keep their dtype."""
    dtype = jnp.dtype(options.frozen_dtype)

    def cast(x: Any) -> Any:
        wider = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > dtype.itemsize
        return x.astype(dtype) if wider else x

    return jax.tree.map(cast, frozen)


def abstract_state(params: Params, options: Options, mesh: Mesh | AbstractMesh) -> TrainState:
    """`init_state` as shapes with shardings; `params` are the trained ones, arrays or shapes."""
    tx = optimizer(options)

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))

    return sharded(mesh, jax.eval_shape(init, params))


def sharded(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shapes of parameters with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, parallel.param_sharding(mesh, tree)
    )


def init_state(params: Params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state that starts from these parameters, sharded over the mesh. The parameters passed in stay usable."""

    def init(params: Params) -> TrainState:
        # Copies: the step donates its state, whose arrays may not share buffers.
        return TrainState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, params), tx.init(params)
        )

    shardings = parallel.param_sharding(mesh, jax.eval_shape(init, params))
    return jax.jit(init, out_shardings=shardings)(parallel.put_global(params, parallel.param_sharding(mesh, params)))


def accumulated_grad(
    loss: Loss,
    params: Params,
    frozen: Params,
    batch: Batch,
    keys: Key,
    microbatches: int,
    mesh: Mesh,
    dtypes: Dtypes = NO_CAST,
):
    """Gradient of the mean loss over a batch, accumulated over a number of microbatches.

    It equals the gradient of the full batch if the loss is a mean over independent examples. A contrastive loss only
    sees the negatives of one microbatch.

    Args:
        dtypes: see `jaxdiff.parallel.gather`, by key of the parameters.

    Returns:
        (gradient of `params`, metrics with "loss").
    """

    def grad(batch: Batch, keys: Key):
        def loss_fn(trained: Params):
            with parallel.tracing(mesh):
                # Each module is gathered by itself, so that frozen ones get no gradient: a LoRA is small beside them.
                gathered = {k: parallel.gather(mesh, x, dtypes.get(k)) for k, x in {**frozen, **trained}.items()}
                return loss(gathered, batch, keys)

        (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, {"loss": value, **metrics}

    if microbatches == 1:
        return grad(batch, keys)

    def split(x: Array) -> Array:
        # Strided, so that examples stay on their device: microbatch i takes every microbatches-th example.
        x = x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, parallel.batch_sharding(mesh, axis=1))

    examples = jax.tree.map(split, (batch, keys))
    shapes = jax.eval_shape(grad, *jax.tree.map(lambda x: x[0], examples))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, x: (jax.tree.map(jnp.add, total, grad(*x)), None), zeros, examples)
    return jax.tree.map(lambda x: x / microbatches, total)


def schedule_count(opt_state: Any) -> Array:
    """[] int32: the updates counted by the learning-rate schedule, without skipped ones."""
    state_type = optax.ScaleByScheduleState
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, state_type))
    return next(x.count for x in states if isinstance(x, state_type))


def with_state(frozen: Params, state: TrainState) -> Params:
    """Frozen parameters with the number of updates and the moving average of the trained parameters."""
    return {**frozen, STATE: {"step": state.step, "ema": state.ema}}


def split_state(params: Params) -> tuple[Params, dict[str, Any]]:
    """The parameters of a loss that reads the state, and {"step", "ema"} of `with_state`."""
    return {name: x for name, x in params.items() if name != STATE}, params[STATE]


def make_train_step(
    loss: Loss, options: Options, mesh: Mesh, state: TrainState, dtypes: Dtypes = NO_CAST, reads_state: bool = False
) -> Callable:
    """One update, compiled: (state (donated), frozen parameters, batch [B, ...]) -> (state, metrics).

    The new state is sharded as `state` is. For `dtypes` and `reads_state` see `jaxdiff.training.loop.Stage`.

    A step whose loss, gradient or update is not finite leaves everything but `step` unchanged, and the metric "skipped"
    is 1 instead of 0.

    Every example has its own key, from the seed, the step and its row in the batch. Random numbers therefore depend
    neither on the number of hosts or devices nor on `accumulate`.
    """
    tx, schedule = optimizer(options), learning_rate(options)
    row_order = parallel.global_row_order(mesh, options.batch_size)
    in_order = bool((row_order == range(options.batch_size)).all())

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(options.seed, impl=PRNG), state.step), options.batch_size
        )
        keys = keys if in_order else keys[row_order]
        frozen = with_state(frozen, state) if reads_state else frozen
        grads, metrics = accumulated_grad(loss, state.params, frozen, batch, keys, options.accumulate, mesh, dtypes)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = ema_update(state.ema, params, options.ema_decay, state.step)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        new = TrainState(state.step, params, ema, opt_state)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        rate = schedule(schedule_count(state.opt_state))
        metrics = {**metrics, "grad_norm": grad_norm, "learning_rate": rate, "skipped": 1 - finite.astype(jnp.int32)}
        return new._replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
