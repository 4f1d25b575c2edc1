"""Guidance: its properties, and diffusers' rescaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.guidance import classifier_free, in_interval, rescale
from jaxdiff.diffusion.schedules import Time

SHAPE = (3, 8, 8, 4)


@pytest.fixture(scope="module")
def predictions():
    keys = jax.random.split(jax.random.key(0), 2)
    cond, uncond = (jax.random.normal(key, SHAPE) for key in keys)
    return cond + 0.3, 2 * uncond


def std(x) -> np.ndarray:
    return np.asarray(x, np.float64).std((1, 2, 3))


def test_scales_of_one_and_zero(predictions):
    cond, uncond = predictions
    np.testing.assert_array_equal(classifier_free(cond, uncond, 0.0), uncond)  # adds 0 times the rest
    np.testing.assert_allclose(classifier_free(cond, uncond, 1.0), cond, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.7, 1.0])
def test_rescale_equals_diffusers(predictions, factor):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    cond, uncond = predictions
    guided = classifier_free(cond, uncond, 7.5)
    there = module.rescale_noise_cfg(*(torch.from_numpy(np.array(x)) for x in (guided, cond)), factor)
    # Float32 sums of 256 terms in two orders: some 1e-7 relative.
    np.testing.assert_allclose(rescale(guided, cond, factor), there.numpy(), rtol=1e-5, atol=1e-6)


def test_rescale_reaches_the_conditional_deviation_sample_by_sample(predictions):
    cond, uncond = predictions
    guided = classifier_free(cond, uncond, 7.5)
    np.testing.assert_array_equal(rescale(guided, cond, 0.0), guided)  # multiplies by 1 + 0
    np.testing.assert_allclose(std(rescale(guided, cond, 1.0)), std(cond), rtol=1e-5)
    mixed = rescale(guided, cond, jnp.array([0.0, 0.5, 1.0]))
    for i, factor in enumerate((0.0, 0.5, 1.0)):
        alone = rescale(guided[i : i + 1], cond[i : i + 1], factor)
        np.testing.assert_allclose(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_rescale_leaves_a_constant_as_it_is():
    constant = jnp.full(SHAPE, 2.0)
    np.testing.assert_array_equal(rescale(constant, constant, 0.7), constant)  # sums of 2 are exact


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rescale_keeps_the_type_and_does_not_overflow(dtype):
    """Squares of 500 are more than float16 holds."""
    guided = (500 * jax.random.normal(jax.random.key(0), SHAPE)).astype(dtype)
    ours = rescale(guided, guided / 2, 1.0)
    assert ours.dtype == dtype
    np.testing.assert_allclose(std(ours), std(guided) / 2, rtol=4 * float(jnp.finfo(dtype).eps))


def test_interval_is_open_below_and_closed_above():
    sigma = jnp.array([0.25, 0.5, 1.0, 2.0, 2.5])
    time = Time(jnp.zeros(5), jnp.ones(5), sigma)
    assert in_interval(time, 0.5, 2.0).tolist() == [False, False, True, True, False]
    scaled = Time(jnp.zeros(5), 0.5 * time.alpha, 0.5 * time.sigma)  # a variance-preserving process
    assert in_interval(scaled, 0.5, 2.0).tolist() == [False, False, True, True, False]


def test_pure_noise_is_inside_only_an_interval_without_end():
    time = Time(jnp.float32(999), jnp.float32(0), jnp.float32(1))
    with jax.debug_nans(True):
        assert bool(in_interval(time, 0.0, jnp.inf))
        assert not bool(in_interval(time, 0.0, 1e9))


def test_interval_bounds_may_be_traced():
    time = Time(jnp.float32(10), jnp.float32(1), jnp.float32(1))
    inside = jax.jit(lambda low, high: in_interval(time, low, high))
    assert [bool(inside(*bounds)) for bounds in ((0.5, 1.5), (1.0, 1.5), (0.5, 1.0))] == [True, False, True]
