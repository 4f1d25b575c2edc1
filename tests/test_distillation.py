"""Distillation to few steps: the mathematics on data whose paths are known, and the stages on the tiny model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion import consistency
from jaxdiff.diffusion.schedules import noise_schedule

ZERO_SNR = SchedulerConfig(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
)  # fmt: skip
SPREAD = 0.5  # the data are Gaussian, of this deviation


# --- Gaussian data: x0 ~ N(0, SPREAD^2), so that a path is x(phi) = C rho(phi)


def rho(phi):
    return jnp.sqrt((SPREAD * jnp.cos(phi)) ** 2 + jnp.sin(phi) ** 2)


def ideal_velocity(x, phi):
    """v of the exact denoiser, E[cos eps - sin x0 | x]."""
    return jnp.cos(phi) * jnp.sin(phi) * (1 - SPREAD**2) / rho(phi) ** 2 * x


def ideal_network(x, phi):
    """F of the exact consistency function, f = cos x - sin F = SPREAD x / rho."""
    return (jnp.cos(phi) - SPREAD / rho(phi)) / jnp.sin(phi) * x


def gaussian(count=64):
    """Points of many angles: (x [B, 1], phi [B])."""
    phi = jnp.linspace(0.05, 1.57, count)
    return rho(phi)[:, None] * jax.random.normal(jax.random.key(0), (count, 1)), phi


def test_the_exact_consistency_function_has_no_tangent():
    """Its derivative along the path is zero; that of another function is not."""
    x, phi = gaussian()
    teacher, one = ideal_velocity(x, phi[:, None]), jnp.ones_like(phi)

    def tangent(network):
        return consistency.tangent(lambda x, t: network(x, t[:, None]), x, phi, phi, one, teacher, 1.0)[1]

    np.testing.assert_allclose(tangent(ideal_network), 0, atol=2e-5)
    assert float(jnp.abs(tangent(ideal_velocity)).mean()) > 0.1


def test_the_tangent_is_the_derivative_along_the_path():
    """Of any function, here one without meaning, by finite differences in float64 of f on the teacher's exact path."""
    x, phi = (np.asarray(a, np.float64) for a in gaussian())

    def network(x, phi):
        return jnp.sin(3 * x) * jnp.cos(2 * phi) + x**2 / 3

    def f(phi_to):
        moved = x * np.asarray(rho(phi_to) / rho(phi))[:, None]
        to = phi_to[:, None]
        return np.cos(to) * moved - np.sin(to) * (np.sin(3 * moved) * np.cos(2 * to) + moved**2 / 3)

    h = 1e-3
    expected = (f(phi + h) - f(phi - h)) / (2 * h)
    x32, phi32 = jnp.asarray(x, jnp.float32), jnp.asarray(phi, jnp.float32)
    teacher = ideal_velocity(x32, phi32[:, None])
    # Times that go at another pace than the angle: t = 100 phi^2.
    t, rate = 100 * phi32**2, 200 * phi32
    value, g = consistency.tangent(
        lambda x, t: network(x, jnp.sqrt(t / 100)[:, None]), x32, t, phi32, rate, teacher, 1.0
    )
    np.testing.assert_allclose(value, network(x32, phi32[:, None]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(g, expected, rtol=1e-2, atol=3e-3)


def test_the_loss_leads_to_the_closed_form():
    """A sum of sines of the angle times x, taught by the exact velocity alone: the only point where its gradient is
    zero is the exact consistency function, and gradient descent is drawn to it."""
    x, phi = gaussian(256)
    teacher, one, waves = ideal_velocity(x, phi[:, None]), jnp.ones_like(phi), jnp.arange(1, 6)

    def network(weights, x, phi):
        return (weights * jnp.sin(waves * phi[:, None])).sum(-1, keepdims=True) * x

    def loss(weights):  # without normalisation, so that the gradient is linear in the weights
        f, g = consistency.tangent(functools.partial(network, weights), x, phi, phi, one, teacher, 1.0)
        return ((f - jax.lax.stop_gradient(f + g)) ** 2).mean()

    gradient = jax.grad(loss)
    slope = np.asarray(jax.jit(jax.jacobian(gradient))(jnp.zeros(5)), np.float64)
    assert np.linalg.eigvals(slope).real.min() > 0
    weights = np.linalg.solve(slope, -np.asarray(gradient(jnp.zeros(5)), np.float64))
    ends = jnp.cos(phi)[:, None] * x - jnp.sin(phi)[:, None] * network(jnp.asarray(weights, jnp.float32), x, phi)
    np.testing.assert_allclose(ends, SPREAD * x / rho(phi)[:, None], atol=0.02)


def test_the_angle_of_a_schedule_goes_from_the_image_to_pure_noise():
    schedule = noise_schedule(ZERO_SNR)
    phi, rate = consistency.angles(schedule)
    np.testing.assert_allclose(np.cos(phi), schedule.alpha, atol=1e-6)
    np.testing.assert_allclose(np.sin(phi), schedule.sigma, atol=1e-6)
    assert phi[-1] == pytest.approx(np.pi / 2)
    steps = np.diff(phi.astype(np.float64))
    np.testing.assert_allclose(2 / rate[1:-1], steps[1:] + steps[:-1], rtol=1e-3)


def test_a_consistency_function_begins_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    t = jnp.asarray([0.0, 19.0, 999.0])
    f = consistency.consistency(jnp.ones_like(x), x, t)
    np.testing.assert_array_equal(f[0], x[0])
    np.testing.assert_allclose(f[1:], 1.0, atol=1e-4)
