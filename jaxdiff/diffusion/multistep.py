"""Multistep methods: they average the predictions of several steps. One formula covers all of them.

Each takes the DDIM step, equation (3) of schedulers.py, with an average of predictions instead of the latest one:

    m = w_0 m_i + w_1 m_{i-1} + w_2 m_{i-2} + …,   sum_k w_k r_k^n = mu_n,   n = 0, 1, 2, …               (6)

What is averaged is x0, eps or the network's own output. With s the variable of integration, the nodes
r_k = (s_{i-k} - s_i) / (s_{i+1} - s_i) are where the predictions were made, in units of this step, and mu_n are the
moments of the integrand's weight over the step, r in [0, 1]: (6) integrates the polynomial in s through the past
predictions. A constant weight (Adams-Bashforth) has mu_n = 1 / (n + 1):

    LMS    eps in s = sigma / alpha                    PNDM    the network's output in s = step number

The exact solution in lambda = log(alpha / sigma) has an exponential weight (Lu et al. 2022, DPM-Solver++, equation 9),

    mu_n = n! phi_{n+1}(k) / phi_1(k),   phi_n(k) = sum_j k^j / (j + n)!,   h = lambda' - lambda               (7)

with k = -h for x0, h for eps and -2h for x0 under the SDE (eta = 1). DPM-Solver++ and UniPC use (7), except for the
moments that their papers or code simplify; each says which.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.base import (
    Scheduler,
    ddim_step,
    initial,
    noise_like,
    predict,
    sigma_ratio,
    step_count,
    step_end,
    time_at,
    to_eps,
)
from jaxdiff.diffusion.prediction import target, to_denoised
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key

Moments = Sequence[Sequence[Array | float]]  # mu_0, mu_1, … of order 1, of order 2, …
CONSTANT_WEIGHT: Moments = [[1 / (n + 1) for n in range(order)] for order in range(1, 5)]


class History(NamedTuple):
    """The state of a multistep scheduler."""

    x: Array  # [B, ...] float32
    denoised: Array  # [B, ...] float32
    steps_taken: Array  # [] int32
    predictions: Array  # [K, B, ...] float32, to be averaged; the latest first
    previous_x: Array  # [B, ...] float32, x at the start of the last step


def _init(count: int) -> Callable[[Array], History]:
    """The `init` of a scheduler that keeps `count` predictions."""

    def init(x: Array) -> History:
        x, denoised = initial(x)
        return History(x, denoised, jnp.int32(0), jnp.stack([0 * x] * count), x)  # 0 * x: zeros on the devices of x

    return init


def _average(weights: Array, values: Array) -> Array:
    return jnp.tensordot(weights, values, 1)


def _ddim_step_with(
    m: Array, x: Array, prediction_type: str, time: Time, next_time: Time, eta: float = 0.0, noise: Array | float = 0.0
) -> Array:
    """The DDIM step from x with a prediction m of type `prediction_type`."""
    x0 = to_denoised(m, x, time, prediction_type)
    return ddim_step(x0, to_eps(x, x0, time), time, next_time, eta, noise)


def _from_x0(x0: Array, x: Array, time: Time, prediction_type: str) -> Array:
    """A prediction of x0 converted to another prediction type."""
    return target(x0, to_eps(x, x0, time), time, prediction_type)


# ---- weights


def _solve_weights(nodes: Sequence[Array | float], moments: Sequence[Array | float]) -> list[Array]:
    """The weights of (6): w_k is the moments' value on the Lagrange polynomial of node k."""
    weights = []
    for i, node in enumerate(nodes):
        polynomial = [jnp.float32(1.0)]  # its coefficients, from the constant one
        for j, other in enumerate(nodes):
            if j != i:
                shifted, unshifted = [0.0, *polynomial], [*polynomial, 0.0]
                polynomial = [(a - other * b) / (node - other) for a, b in zip(shifted, unshifted, strict=True)]
        weights.append(sum(c * m for c, m in zip(polynomial, moments, strict=True)))
    return weights


def _weights(order: Array, nodes: Sequence[Array | float], moments: Moments) -> Array:
    """The weights [K] at a traced order, zero beyond it; `moments` has those of each order, 1 to K."""
    count = len(moments[-1])
    choices = [[*_solve_weights(nodes[: len(m)], m), *[jnp.float32(0.0)] * (count - len(m))] for m in moments]
    return jnp.stack([jnp.stack(w) for w in choices])[order - 1]


def _nodes(times: Time, i: Array, order: Array, count: int, distance: Callable[[Time, Time], Array]) -> list:
    """The nodes r_0 = 0, r_1, … of (6); beyond the order they are distinct, finite and not used."""
    current = time_at(times, i)
    step = distance(current, time_at(times, i + 1))
    nodes: list = [0.0]
    for k in range(1, count):
        r = -distance(time_at(times, jnp.maximum(i - k, 0)), current) / jnp.where(order > k, step, 1.0)
        # A node at pure noise is infinitely far; within this bound, products of three nodes stay finite in float32.
        nodes.append(jnp.where(order > k, jnp.maximum(r, -1e6), -100.0 * k))
    return nodes


def _lambda_distance(time: Time, next_time: Time) -> Array:
    """h = lambda' - lambda."""
    return -jnp.log(sigma_ratio(time, next_time))


def _sigma_distance(time: Time, next_time: Time) -> Array:
    """sigma' / alpha' - sigma / alpha."""
    start, end = (m.sigma / jnp.maximum(m.alpha, 1e-6) for m in (time, next_time))
    return end - start


def _phi(k: Array) -> tuple[Array, Array, Array, Array]:
    """phi_1 … phi_4 of (7); by their series where |k| < 1, where the closed forms lose digits."""
    is_small = jnp.abs(k) < 1
    small, large = jnp.where(is_small, k, 0.0), jnp.where(is_small, 1.0, k)
    closed_forms = [jnp.expm1(large) / large]
    for factorial in (1, 2, 6):
        closed_forms.append((closed_forms[-1] - 1 / factorial) / large)
    values = []
    for n, closed_form in enumerate(closed_forms, 1):
        series = jnp.ones_like(k)
        for j in range(9, 0, -1):
            series = 1 + series * small / (j + n)
        values.append(jnp.where(is_small, series / (1, 2, 6, 24)[n - 1], closed_form))
    return tuple(values)  # type: ignore[return-value]


def _lambda_order(times: Time, i: Array, steps_taken: Array, order: int, lower_order_final: Array | bool) -> Array:
    """The order of step i of a solver in lambda.

    It is at most one more than the steps taken, falls to …, 2, 1 at the last steps with `lower_order_final`, and is 1
    if the step has no length or starts or ends where lambda is infinite.
    """
    effective_order = jnp.minimum(steps_taken + 1, order)
    effective_order = jnp.where(lower_order_final, jnp.minimum(effective_order, step_count(times) - i), effective_order)
    r = sigma_ratio(time_at(times, i), time_at(times, i + 1))
    return jnp.where((r > 0) & (r < 1), jnp.maximum(effective_order, 1), 1)


def _lambda_length(times: Time, i: Array) -> Array:
    """h of step i; 1 where `_lambda_order` is 1 because h is 0 or infinite."""
    r = sigma_ratio(time_at(times, i), time_at(times, i + 1))
    return -jnp.log(jnp.where((r > 0) & (r < 1), r, 1 / jnp.e))


# ---- methods


def _check_options(order: int, solver_type: str, solver_types: Sequence[str], prediction_type: str) -> None:
    """Raise ValueError naming the first option of a solver in lambda that is unknown."""
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order {order} must be 1, 2 or 3.")
    if solver_type not in solver_types:
        raise ValueError(f"solver_type {solver_type!r} is unknown; known are {' and '.join(solver_types)}.")
    if prediction_type not in ("sample", "epsilon"):
        raise ValueError(f"prediction_type {prediction_type!r} cannot be averaged here: take sample or epsilon.")


def lms() -> Scheduler:
    """Linear multistep of order 4 (Crowson 2022, k-diffusion's `sample_lms`): (6) with eps in s = sigma / alpha.

    If the first steps are skipped, the order still follows the step's index, and the predictions that were never made
    count as zero, as in diffusers' class.
    """
    count = 4

    def weights(times: Time, i: Array, order: Array) -> Array:
        return _weights(order, _nodes(times, i, order, count, _sigma_distance), CONSTANT_WEIGHT)

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        time, next_time = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        eps = to_eps(state.x, x0, time)
        predictions = jnp.concatenate([eps[None], state.predictions[:-1]])
        average = _average(weights(times, i, jnp.minimum(i + 1, count)), predictions)
        # The DDIM step, and what the average changes in it: nothing at the first step, which may start at alpha = 0.
        has_signal = time.alpha > 0
        gain = next_time.sigma - time.sigma * next_time.alpha / jnp.where(has_signal, time.alpha, 1.0)
        x = ddim_step(x0, eps, time, next_time) + jnp.where(has_signal, gain, 0.0) * (average - eps)
        return History(x, x0, state.steps_taken + 1, predictions, state.x)

    return Scheduler(_init(count), step)


def dpmpp_2m(
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 0.0,
    prediction_type: str = "sample",
) -> Scheduler:
    """DPM-Solver++ (Lu et al. 2022, algorithm 2 and appendix B; DPM-Solver, appendix D), one network call a step.

    Moments (7), except that mu_1 = 1/2 at order 2 with "midpoint", and mu_2 is halved at order 3, as in the authors'
    code: order 3 is thus more accurate than 2, but not of third order. (For the SDE their code has the opposite sign in
    that half; here it is the solution's.) The first steps, and a last step to a clean sample, have lower orders.

    Args:
        lower_order_final: with fewer than 15 steps, whether the last two are of order 2 and 1 at most.
        euler_at_final: whether the last step is always of order 1.
        order: 1, 2 or 3.
        solver_type: "midpoint" or "heun", at order 2.
        eta: 0, or 1 for the SDE, sde-dpmsolver++.
        prediction_type: what to average: "sample" for DPM-Solver++, "epsilon" for the original DPM-Solver, which
            cannot step to a clean sample.

    Raises:
        ValueError: `order`, `solver_type` or `prediction_type` is none of these.
    """
    _check_options(order, solver_type, ("midpoint", "heun"), prediction_type)

    def weights(times: Time, i: Array, effective_order: Array) -> Array:
        h = _lambda_length(times, i)
        phi = _phi(h if prediction_type == "epsilon" else -(1 + eta**2) * h)
        slope = phi[1] / phi[0]
        moments: Moments = [[1.0], [1.0, 0.5 if solver_type == "midpoint" else slope], [1.0, slope, phi[2] / phi[0]]]
        return _weights(effective_order, _nodes(times, i, effective_order, order, _lambda_distance), moments[:order])

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        steps = step_count(times)
        time, next_time = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        predictions = jnp.concatenate([_from_x0(x0, state.x, time, prediction_type)[None], state.predictions[:-1]])
        effective_order = _lambda_order(times, i, state.steps_taken, order, jnp.asarray(steps < 15) & lower_order_final)
        if euler_at_final:
            effective_order = jnp.where(i == steps - 1, 1, effective_order)
        noise = noise_like(keys, state.x) if eta else 0.0
        average = _average(weights(times, i, effective_order), predictions)
        x = _ddim_step_with(average, state.x, prediction_type, time, next_time, eta, noise)
        return History(x, x0, state.steps_taken + 1, predictions, state.x)

    return Scheduler(_init(order), step)


def unipc(
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    prediction_type: str = "sample",
    disable_corrector: Sequence[int] = (),
) -> Scheduler:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), one network call a step.

    The prediction at the end of a step also corrects that step: it is taken again with one more node, r = 1, in (6).
    Moments (7), except that where mu_1 is the only free moment (predictor of order 2, corrector of order 1) it is
    B(h) / 2: 1/2 with "bh2" and 1 / (2 phi_1) with "bh1".

    Args:
        order: of the predictor, 1, 2 or 3; the corrector's is one higher.
        solver_type: "bh1" or "bh2".
        lower_order_final: whether the last steps have orders …, 2, 1.
        prediction_type: what to average, "sample" or "epsilon".
        disable_corrector: indices of the steps that are not corrected.

    Raises:
        ValueError: `order`, `solver_type` or `prediction_type` is none of these.
    """
    _check_options(order, solver_type, ("bh1", "bh2"), prediction_type)

    def weights(times: Time, i: Array, effective_order: Array, corrector: bool) -> Array:
        h = _lambda_length(times, i)
        phi = _phi(h if prediction_type == "epsilon" else -h)
        simple = [1.0, 0.5 if solver_type == "bh2" else 0.5 / phi[0]]
        exact = [1.0, phi[1] / phi[0], 2 * phi[2] / phi[0], 6 * phi[3] / phi[0]]
        nodes = _nodes(times, i, effective_order, order, _lambda_distance)
        if corrector:
            return _weights(effective_order, [1.0, *nodes], [simple, exact[:3], exact][:order])
        return _weights(effective_order, nodes, [exact[:1], simple, exact[:3]][:order])

    def order_at(times: Time, i: Array, steps_taken: Array) -> Array:
        return _lambda_order(times, i, steps_taken, order, lower_order_final)

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        time, next_time, previous = time_at(times, i), time_at(times, i + 1), jnp.maximum(i - 1, 0)
        x0 = predict(denoise, state.x, time)
        latest = _from_x0(x0, state.x, time, prediction_type)[None]

        corrector = weights(times, previous, order_at(times, previous, state.steps_taken - 1), True)
        average = _average(corrector, jnp.concatenate([latest, state.predictions]))
        corrected = _ddim_step_with(average, state.previous_x, prediction_type, time_at(times, previous), time)
        corrects = (state.steps_taken > 0) & ~jnp.isin(i - 1, jnp.array(disable_corrector, jnp.int32))
        x = jnp.where(corrects, corrected, state.x)

        predictions = jnp.concatenate([latest, state.predictions[:-1]])
        average = _average(weights(times, i, order_at(times, i, state.steps_taken), False), predictions)
        predicted = _ddim_step_with(average, x, prediction_type, time, next_time)
        return History(predicted, x0, state.steps_taken + 1, predictions, x)

    return Scheduler(_init(order), step)


def pndm(skip_prk_steps: bool = True, prediction_type: str = "epsilon") -> Scheduler:
    """Pseudo linear multistep (Liu et al. 2022, PNDM, equation 13 and algorithm 2), of order 4 once under way.

    It starts with one step of Heun's method (a second network call; a first-order step if the grid has only one), or,
    with `skip_prk_steps` false and at least four steps, with three Runge-Kutta steps (three further calls each).

    diffusers lists the second call of Heun's step among its timesteps, but does not count it when it skips the first
    `start` steps. So with start > 0, x must have the noise level of entry start - 1 (of entry 1 for start = 1). Heun's
    step, which has index `start`, goes from there to entry `start`; the next step starts at entry start + 1.

    Args:
        skip_prk_steps: whether to start with a Heun step rather than with Runge-Kutta steps.
        prediction_type: the network's; these predictions are averaged.
    """
    count = 4

    def start_index(start: Array | int) -> Array | int:
        return start - (start > 1) if skip_prk_steps else start

    def first_step(denoise: Denoise, x: Array, first: Array, times: Time, i: Array, runge_kutta: bool) -> Array:
        """A Heun or Runge-Kutta step from x and the prediction there.

        Each further call is (the time that x is stepped to, the time given to the network, its weight in the average).
        """
        previous = jnp.maximum(i - 1, 0) if skip_prk_steps else i  # the step ends at the entry after this one
        time, next_time, substeps = time_at(times, previous), time_at(times, previous + 1), times.substeps
        start_time = time_at(times, start_index(i))
        if runge_kutta:
            if substeps is None:
                raise ValueError("pndm needs the midpoint of each step: make its grid with time_grid.")
            query_time, target_time = time_at(substeps, (i, 0)), time_at(substeps, (i, 1))
            extra_calls = [(target_time, query_time, 2.0), (query_time, query_time, 2.0), (next_time, next_time, 1.0)]
            step_start = time
        else:
            extra_calls = [(step_end(times, start_index(i)), next_time, 1.0)]
            step_start = time if substeps is None else time_at(substeps, (previous, 0))

        def call(carry: tuple[Array, Array], extra_call: tuple[Time, Time, Array]) -> tuple[tuple[Array, Array], None]:
            (latest, total), (target_time, query_time, weight) = carry, extra_call
            x_target = _ddim_step_with(latest, x, prediction_type, start_time, target_time)
            latest = _from_x0(predict(denoise, x_target, query_time), x_target, query_time, prediction_type)
            return (latest, total + weight * latest), None

        stacked = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(b) for b in a]), *extra_calls)
        total = jax.lax.scan(call, (first, first), stacked)[0][1]
        return _ddim_step_with(total / (6 if runge_kutta else 2), x, prediction_type, step_start, next_time)

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        steps = step_count(times)
        runge_kutta = not skip_prk_steps and len(times.t) > 4  # grids of fewer steps are not padded
        starting = state.steps_taken < (3 if runge_kutta else 1)
        starting &= steps > 1 if skip_prk_steps else i < steps - 1
        time = time_at(times, jnp.where(starting, start_index(i), i))
        x0 = predict(denoise, state.x, time)
        latest = _from_x0(x0, state.x, time, prediction_type)
        predictions = jnp.concatenate([latest[None], state.predictions[:-1]])

        def multistep(x: Array) -> Array:
            order = jnp.minimum(state.steps_taken + 1, count)
            average = _average(_weights(order, [0.0, -1.0, -2.0, -3.0], CONSTANT_WEIGHT), predictions)
            return _ddim_step_with(average, x, prediction_type, time, step_end(times, i))

        x = jax.lax.cond(starting, lambda x: first_step(denoise, x, latest, times, i, runge_kutta), multistep, state.x)
        return History(x, x0, state.steps_taken + 1, predictions, state.x)

    return Scheduler(_init(count), step, start_index)
