"""Consistency models: networks that go from any point of a probability-flow ODE to its end in one step.

    f(x, t) = c_skip x + c_out x0(x, t),   c_skip = 0.25 / ((s t)^2 + 0.25),   c_out = s t / sqrt((s t)^2 + 0.25)  (1)

is that function, made of the network's prediction of x0, with f(x, 0) = x (Song et al. 2023, equation 5; s is the
`timestep_scaling` of Luo et al. 2023). It is learnt from a teacher's ODE, by one of two losses:

Discrete (latent consistency distillation, Luo et al. 2023, algorithm 1): f(x, t) is to equal f(x', t'), where the
guided teacher's DDIM step leads from (x, t) to (x', t'), t' = t - k, and the second f has averaged parameters.

Continuous (sCM, Lu & Song 2024). In a variance-preserving process the angle phi = arctan(sigma / alpha) is a time,

    x = cos(phi) x0 + sin(phi) eps,   dx/dphi = v,   f(x, phi) = cos(phi) x - sin(phi) F(x, phi)                     (2)

with v the teacher's v-prediction and F the network's: their TrigFlow, with latents of unit deviation. f is constant
along the ODE where its derivative,

    df/dphi = cos(phi) (v - F) - sin(phi) (x + dF/dphi),   dF/dphi = dF/dx v + dF/dt dt/dphi                         (3)

is zero; dF/dphi is one Jacobian-vector product. The gradient of |F - stop(F + g)|^2 moves F by g, which is (3)
normalised. Their equation 8 has another factor cos(phi); the normalisation takes most of it away again, and without
it pure noise, cos(phi) = 0, is learnt as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.base import ddim_step, to_eps
from jaxdiff.diffusion.prediction import expand
from jaxdiff.diffusion.schedules import NoiseSchedule, Time
from jaxdiff.typing import Array

SIGMA_DATA = 0.5  # of equation (1); fixed in both papers' code and in diffusers, whatever the data's deviation
TANGENT_FLOOR = 0.1  # c of g / (|g| + c), Lu & Song 2024, section 4.1


def boundary(t: Array, timestep_scaling: float = 10.0) -> tuple[Array, Array]:
    """c_skip and c_out of equation (1), in the shape of t.

    >>> [float(c) for c in boundary(jnp.float32(0.0))]
    [1.0, 0.0]
    """
    scaled = t * timestep_scaling
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / jnp.sqrt(scaled**2 + SIGMA_DATA**2)


def consistency(x0: Array, x: Array, t: Array, timestep_scaling: float = 10.0) -> Array:
    """f of equation (1) from a prediction of x0 [B, ...] at x [B, ...] and t, scalar or [B] in training steps."""
    skip, out = (expand(c, x) for c in boundary(t, timestep_scaling))
    return out * x0 + skip * x


def solver_step(x0: Array, x: Array, time: Time, below: Time) -> Array:
    """x' [B, ...] of the DDIM step from `time` to the less noisy `below`, fields [B], with a prediction of x0."""
    start, end = (Time(expand(s.t, x), expand(s.alpha, x), expand(s.sigma, x)) for s in (time, below))
    return ddim_step(x0, to_eps(x, x0, start), start, end)


def pseudo_huber(error: Array, c: float) -> Array:
    """sqrt(error^2 + c^2) - c of each element: Song & Dhariwal 2023, equation 8, element by element."""
    return jnp.sqrt(error**2 + c**2) - c


class Angles(NamedTuple):
    """The angle of equation (2) at each time of a schedule, and the derivative of the timestep with respect to it."""

    phi: np.ndarray  # [T] float32
    rate: np.ndarray  # [T] float32: dt / dphi


def angles(schedule: NoiseSchedule) -> Angles:
    """The angles of a variance-preserving schedule."""
    phi = np.arctan2(np.asarray(schedule.sigma, np.float64), np.asarray(schedule.alpha, np.float64))
    return Angles(phi.astype(np.float32), (1 / np.gradient(phi)).astype(np.float32))


def tangent(
    velocity: Callable[[Array, Array], Array],
    x: Array,
    t: Array,
    phi: Array,
    rate: Array,
    teacher: Array,
    warmup: Array,
) -> tuple[Array, Array]:
    """F and the derivative of equation (3), both [B, ...].

    Args:
        velocity: F as a function of x [B, ...] and t [B].
        phi, rate: the angle at t and dt/dphi, [B].
        teacher: the teacher's v at x and t, [B, ...].
        warmup: weight of the second term, scalar in [0, 1]: at 0 F learns v itself (Lu & Song 2024, section 4.1).
    """
    cos, sin = expand(jnp.cos(phi), x), expand(jnp.sin(phi), x)
    # The tangent is scaled by sin(phi), so that the product stays small.
    f, derivative = jax.jvp(velocity, (x, t), (sin * teacher, jnp.sin(phi) * rate))
    value = jax.lax.stop_gradient(f)
    return f, jax.lax.stop_gradient(cos * (teacher - value) - warmup * (sin * x + derivative))


def normalised(g: Array) -> Array:
    """g / (|g| + c) of each sample [B, ...], where |g| is its root mean square."""
    axes = tuple(range(1, g.ndim))
    return g / (jnp.sqrt(jnp.mean(g**2, axes, keepdims=True)) + TANGENT_FLOOR)
