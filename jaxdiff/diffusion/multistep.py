"""Methods that remember the predictions of earlier steps, all one formula.

Each is the first-order step, equation (3) of schedulers.py, taken with an average of predictions instead of the last:

    m = w_0 m_i + w_1 m_{i-1} + w_2 m_{i-2} + …,   sum_k w_k r_k^n = mu_n,   n = 0, 1, 2, …               (6)

What is averaged is x0, eps or what the network itself predicts. The places of the predictions, r_k = (s_{i-k} - s_i) /
(s_{i+1} - s_i), and the moments mu_n over the step, r in [0, 1], say how: (6) integrates the polynomial in s through
the past predictions. With a step of constant weight, mu_n = 1 / (n + 1):

    LMS    eps in s = sigma / alpha                    PNDM    the network's prediction, in s = step number

The exact solution in lambda = log(alpha / sigma) weighs by an exponential (Lu et al. 2022, DPM-Solver++, equation 9),

    mu_n = n! phi_{n+1}(k) / phi_1(k),   phi_n(k) = sum_j k^j / (j + n)!,   h = lambda' - lambda               (7)

with k = -h for x0, h for eps and -2h for x0 under the SDE (eta = 1). DPM-Solver++ and UniPC are (7), but for the
moments that their papers or codes simplify; see there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.base import Scheduler, arrival, first_order, initial, noise_in, normal, predict, ratio, time_at
from jaxdiff.diffusion.prediction import target, to_denoised
from jaxdiff.diffusion.schedules import Time
from jaxdiff.typing import Array, Denoise, Key

CONSTANT = [[1 / (n + 1) for n in range(order)] for order in range(1, 5)]  # moments of a constant weight


Moments = Sequence[Sequence[Array | float]]


class History(NamedTuple):
    """What a multistep method remembers; of the predictions it averages, the latest first."""

    x: Array  # [B, ...] float32
    denoised: Array  # [B, ...] float32
    taken: Array  # [] int32, steps taken
    past: Array  # [K, B, ...] float32
    before: Array  # [B, ...] float32, where the step before set out from


def _start(keep: int) -> Callable[[Array], History]:
    def init(x: Array) -> History:
        x, denoised = initial(x)
        return History(x, denoised, jnp.int32(0), jnp.stack([0 * x] * keep), x)  # made of x: on the devices where x is

    return init


def _average(weights: Array, values: Array) -> Array:
    return jnp.tensordot(weights, values, 1)


def _carry(
    x: Array, m: Array, kind: str, time: Time, then: Time, eta: float = 0.0, noise: Array | float = 0.0
) -> Array:
    """The first-order step from x with a prediction m of some kind."""
    x0 = to_denoised(m, x, time, kind)
    return first_order(x0, noise_in(x, x0, time), time, then, eta, noise)


def _as(kind: str, x: Array, x0: Array, time: Time) -> Array:
    """A prediction of x0 as one of another kind."""
    return target(x0, noise_in(x, x0, time), time, kind)


# ---- weights


def _solve(places: Sequence[Array | float], moments: Sequence[Array | float]) -> list[Array]:
    """The weights of (6): each is the moments' value on one of Lagrange's polynomials."""
    weights = []
    for i, place in enumerate(places):
        polynomial = [jnp.float32(1.0)]  # its coefficients, from the constant one
        for j, other in enumerate(places):
            if j != i:
                above, below = [0.0, *polynomial], [*polynomial, 0.0]
                polynomial = [(a - other * b) / (place - other) for a, b in zip(above, below, strict=True)]
        weights.append(sum(c * m for c, m in zip(polynomial, moments, strict=True)))
    return weights


def _weights(order: Array, places: Sequence[Array | float], moments: Moments) -> Array:
    """The weights [K] of one order, where `moments` has those of the orders 1, 2, … up to K places."""
    keep = len(moments[-1])
    choices = [[*_solve(places[: len(m)], m), *[jnp.float32(0.0)] * (keep - len(m))] for m in moments]
    return jnp.stack([jnp.stack(w) for w in choices])[order - 1]


def _places(times: Time, i: Array, order: Array, keep: int, distance: Callable[[Time, Time], Array]) -> list:
    """r_0 = 0, r_1, … of (6); those that the order has no use for are harmless numbers."""
    here = time_at(times, i)
    step = distance(here, time_at(times, i + 1))
    found: list = [0.0]
    for k in range(1, keep):
        r = -distance(time_at(times, jnp.maximum(i - k, 0)), here) / jnp.where(order > k, step, 1.0)
        # Infinitely far, after pure noise, is far enough; the bound keeps products of three in float32.
        found.append(jnp.where(order > k, jnp.maximum(r, -1e6), -100.0 * k))
    return found


def _in_lambda(time: Time, then: Time) -> Array:
    """h = lambda' - lambda."""
    return -jnp.log(ratio(time, then))


def _in_sigma(time: Time, then: Time) -> Array:
    start, end = (m.sigma / jnp.maximum(m.alpha, 1e-6) for m in (time, then))
    return end - start


def _phi(k: Array) -> tuple[Array, Array, Array, Array]:
    """phi_1 … phi_4 of (7); by the series where the closed forms lose digits."""
    near = jnp.abs(k) < 1
    small, large = jnp.where(near, k, 0.0), jnp.where(near, 1.0, k)
    closed = [jnp.expm1(large) / large]
    for factorial in (1, 2, 6):
        closed.append((closed[-1] - 1 / factorial) / large)
    values = []
    for n, exact in enumerate(closed, 1):
        series = jnp.ones_like(k)
        for j in range(9, 0, -1):
            series = 1 + series * small / (j + n)
        values.append(jnp.where(near, series / (1, 2, 6, 24)[n - 1], exact))
    return tuple(values)  # type: ignore[return-value]


def _exponential_order(times: Time, i: Array, taken: Array, order: int, fewer_at_end: bool) -> Array:
    """Order of step i: what is remembered allows, and 1 where the step has no length or no end in lambda."""
    now = jnp.minimum(taken + 1, order)
    if fewer_at_end:
        now = jnp.minimum(now, len(times.t) - 1 - i)
    r = ratio(time_at(times, i), time_at(times, i + 1))
    return jnp.where((r > 0) & (r < 1), jnp.maximum(now, 1), 1)


def _length(times: Time, i: Array) -> Array:
    """h of step i; 1 where the order is 1 anyway."""
    r = ratio(time_at(times, i), time_at(times, i + 1))
    return -jnp.log(jnp.where((r > 0) & (r < 1), r, 1 / jnp.e))


# ---- methods


def lms() -> Scheduler:
    """Linear multistep of order 4 (Crowson 2022, k-diffusion's `sample_lms`): (6) with eps in s = sigma / alpha.

    Where steps are left out at the beginning, the order is that of the step's number all the same, and the predictions
    that were never made count as zero: diffusers' class does so, and its pictures are followed.
    """
    keep = 4

    def weights(times: Time, i: Array, order: Array) -> Array:
        return _weights(order, _places(times, i, order, keep, _in_sigma), CONSTANT)

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        time, then = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        eps = noise_in(state.x, x0, time)
        past = jnp.concatenate([eps[None], state.past[:-1]])
        ahead = _average(weights(times, i, jnp.minimum(i + 1, keep)), past)
        # Equation (3) and what the average adds to it: nothing at the first step, which may leave pure noise.
        some = time.alpha > 0
        gain = jnp.where(some, then.sigma - time.sigma * then.alpha / jnp.where(some, time.alpha, 1.0), 0.0)
        x = first_order(x0, eps, time, then) + gain * (ahead - eps)
        return History(x, x0, state.taken + 1, past, state.x)

    return Scheduler(_start(keep), step)


def dpmpp_2m(
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 0.0,
    kind: str = "sample",
) -> Scheduler:
    """DPM-Solver++ (Lu et al. 2022, algorithm 2 and appendix B; DPM-Solver, appendix D), one network call a step.

    Moments (7), but mu_1 = 1/2 at order 2 with "midpoint", and half of mu_2 at order 3, as in the authors' code: order
    3 is thus more accurate than 2, but not of third order. (Of the SDE their code has another sign in that
    half, and here it is the solution's.) The first steps have lower orders, and so has the last where it ends in a
    clean sample (sigma' = 0).

    Args:
        lower_order_final: whether the last two of fewer than 15 steps are of order 2 and 1 at most.
        euler_at_final: whether the last step always is of order 1.
        order: 1, 2 or 3.
        solver_type: "midpoint" or "heun", at order 2.
        eta: 0, or 1 for the SDE, sde-dpmsolver++.
        kind: of the predictions averaged: "sample", or "epsilon" for the first DPM-Solver; that one cannot go to a
            clean sample.

    Raises:
        ValueError: another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order {order} must be 1, 2 or 3.")

    def weights(times: Time, i: Array, now: Array) -> Array:
        h = _length(times, i)
        phi = _phi(h if kind == "epsilon" else -(1 + eta**2) * h)
        slope = phi[1] / phi[0]
        moments: Moments = [[1.0], [1.0, 0.5 if solver_type == "midpoint" else slope], [1.0, slope, phi[2] / phi[0]]]
        return _weights(now, _places(times, i, now, order, _in_lambda), moments[:order])

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        steps = len(times.t) - 1
        time, then = time_at(times, i), time_at(times, i + 1)
        x0 = predict(denoise, state.x, time)
        past = jnp.concatenate([_as(kind, state.x, x0, time)[None], state.past[:-1]])
        now = _exponential_order(times, i, state.taken, order, lower_order_final and steps < 15)
        if euler_at_final:
            now = jnp.where(i == steps - 1, 1, now)
        noise = normal(keys, state.x) if eta else 0.0
        x = _carry(state.x, _average(weights(times, i, now), past), kind, time, then, eta, noise)
        return History(x, x0, state.taken + 1, past, state.x)

    return Scheduler(_start(order), step)


def unipc(
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    kind: str = "sample",
    disable_corrector: Sequence[int] = (),
) -> Scheduler:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2), one network call a step.

    The prediction at the end of a step also corrects that step: it is taken again with one more place, r = 1, in (6).
    Moments (7), but where a single one is free (order 2 ahead, order 1 back) mu_1 = B(h) / 2, that is 1/2 with "bh2"
    and 1 / (2 phi_1) with "bh1".

    Args:
        order: 1, 2 or 3 of the predictor; the corrector's is one more.
        solver_type: "bh1" or "bh2".
        lower_order_final: whether the last steps have orders …, 2, 1.
        kind: of the predictions averaged, "sample" or "epsilon".
        disable_corrector: numbers of the steps that are not corrected.

    Raises:
        ValueError: another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order {order} must be 1, 2 or 3.")

    def weights(times: Time, i: Array, now: Array, corrector: bool) -> Array:
        h = _length(times, i)
        phi = _phi(h if kind == "epsilon" else -h)
        simple = [1.0, 0.5 if solver_type == "bh2" else 0.5 / phi[0]]
        exact = [1.0, phi[1] / phi[0], 2 * phi[2] / phi[0], 6 * phi[3] / phi[0]]
        places = _places(times, i, now, order, _in_lambda)
        if corrector:
            return _weights(now, [1.0, *places], [simple, exact[:3], exact][:order])
        return _weights(now, places, [exact[:1], simple, exact[:3]][:order])

    def orders(times: Time, i: Array, taken: Array) -> Array:
        return _exponential_order(times, i, taken, order, lower_order_final)

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        time, then, back = time_at(times, i), time_at(times, i + 1), jnp.maximum(i - 1, 0)
        x0 = predict(denoise, state.x, time)
        here = _as(kind, state.x, x0, time)[None]
        corrector = weights(times, back, orders(times, back, state.taken - 1), True)
        again = _average(corrector, jnp.concatenate([here, state.past]))
        corrects = (state.taken > 0) & ~jnp.isin(i - 1, jnp.array(disable_corrector, jnp.int32))
        x = jnp.where(corrects, _carry(state.before, again, kind, time_at(times, back), time), state.x)
        past = jnp.concatenate([here, state.past[:-1]])
        ahead = _average(weights(times, i, orders(times, i, state.taken), False), past)
        return History(_carry(x, ahead, kind, time, then), x0, state.taken + 1, past, x)

    return Scheduler(_start(order), step)


def pndm(skip_prk_steps: bool = True, kind: str = "epsilon") -> Scheduler:
    """Pseudo linear multistep (Liu et al. 2022, PNDM, equation 13 and algorithm 2), of order 4 after its first steps.

    Its first step is Heun's (a second network call; order 1 where the grid has no other), or its first three are those
    of Runge and Kutta (three further calls each), if there are four or more.

    diffusers lists the second call of Heun's step among the times, and leaves out of that list what is to be left out
    of the steps. So with start > 0 steps left out, x has the noise of entry start - 1 (for start = 1, of entry 1);
    Heun's step, numbered `start`, goes from there to entry `start`; and the next one sets out from entry start + 1.

    Args:
        skip_prk_steps: whether to start by Heun's step.
        kind: what the network predicts, which is what is averaged.
    """
    keep = 4

    def entry(start: Array | int) -> Array | int:
        return start - (start > 1) if skip_prk_steps else start

    def again(denoise: Denoise, x: Array, first: Array, times: Time, i: Array, prk: bool) -> Array:
        """A step of a method that looks ahead: to some times, told some, with weights, out of a sum of weights."""
        before = jnp.maximum(i - 1, 0) if skip_prk_steps else i  # the step ends at the entry after
        time, then, middle = time_at(times, before), time_at(times, before + 1), times.middle
        here = time_at(times, entry(i))
        if prk:
            if middle is None:
                raise ValueError("pndm needs the middle of each step: give it a grid that time_grid has made for it.")
            told, to = time_at(middle, (i, 0)), time_at(middle, (i, 1))
            ways, leave = [(to, told, 2.0), (told, told, 2.0), (then, then, 1.0)], time
        else:
            ways = [(arrival(times, entry(i)), then, 1.0)]
            leave = time if middle is None else time_at(middle, (before, 0))

        def look(carry: tuple[Array, Array], way: tuple[Time, Time, Array]) -> tuple[tuple[Array, Array], None]:
            there, told, weight = way
            there_x = _carry(x, carry[0], kind, here, there)
            m = _as(kind, there_x, predict(denoise, there_x, told), told)
            return (m, carry[1] + weight * m), None

        stacked = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(b) for b in a]), *ways)
        total = jax.lax.scan(look, (first, first), stacked)[0][1]
        return _carry(x, total / (6 if prk else 2), kind, leave, then)

    def step(denoise: Denoise, state: History, times: Time, i: Array, keys: Key) -> History:
        steps = len(times.t) - 1
        prk = not skip_prk_steps and steps >= 4
        looks = (state.taken < (3 if prk else 1)) & (steps > 1 if skip_prk_steps else i < steps - 1)
        time = time_at(times, jnp.where(looks, entry(i), i))
        x0 = predict(denoise, state.x, time)
        past = jnp.concatenate([_as(kind, state.x, x0, time)[None], state.past[:-1]])

        def plain(x: Array) -> Array:
            weights = _weights(jnp.minimum(state.taken + 1, keep), [0.0, -1.0, -2.0, -3.0], CONSTANT)
            return _carry(x, _average(weights, past), kind, time, arrival(times, i))

        x = jax.lax.cond(looks, lambda x: again(denoise, x, past[0], times, i, prk), plain, state.x)
        return History(x, x0, state.taken + 1, past, state.x)

    return Scheduler(_start(keep), step, entry)
