"""Two networks against each other: losses, penalties, augmentation, and the gradient of each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.models.discriminator import PatchDiscriminator, ProjectionDiscriminator
from jaxdiff.training.adversarial import LOSSES, Rules, adaptive_weight, contest, with_gradient
from jaxdiff.training.augment import AUGMENTATIONS, augment, cutout, translation
from jaxdiff.training.ema import PowerAverages
from jaxdiff.training.optimizer import optimizer
from jaxdiff.training.options import ADVERSARIES
from jaxdiff.training.options import AUGMENTATIONS as NAMES
from tests.support.stages import keys, options

BATCH, SIDE = 3, 12


def test_settings_name_every_loss_and_augmentation():
    assert tuple(LOSSES) == ADVERSARIES
    assert tuple(AUGMENTATIONS) == NAMES


def test_losses_of_known_scores():
    real, fake = jnp.asarray([2.0, 0.5]), jnp.asarray([-3.0, 1.0])
    (d, g), f = LOSSES["hinge"](real, fake), lambda x: np.log1p(np.exp(x))
    np.testing.assert_allclose([d, g], [(0.25 + 1.0) / 2, 1.0])
    d, g = LOSSES["non_saturating"](real, fake)
    np.testing.assert_allclose(d, (f(-2) + f(-0.5) + f(-3) + f(1)) / 4, rtol=1e-6)
    np.testing.assert_allclose(g, (f(3) + f(-1)) / 2, rtol=1e-6)
    d, g = LOSSES["relativistic"](real, fake)
    np.testing.assert_allclose([d, g], [(f(-5) + f(0.5)) / 2, (f(5) + f(-0.5)) / 2], rtol=1e-6)


# --- gradients against finite differences


def patches(rng):
    """(scores of a discriminator, its parameters, an example's shape), float64."""
    net = PatchDiscriminator(2, 1, jnp.float64)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 2)))["params"]
    return lambda params, x: net.apply({"params": params}, x), shapes, (SIDE, SIDE, 2)


def projection(rng):
    net, text = ProjectionDiscriminator((2, 3), dtype=jnp.float64), rng.normal(size=(BATCH, 4))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4)))["params"]
    return lambda params, x: net.apply({"params": params}, x, text), shapes, (4, 4, 3)


def along(f, x, direction, eps=1e-6):
    """The derivative of f at x in a direction, by central differences."""
    ends = [f(jax.tree.map(lambda a, d, s=s: a + s * eps * d, x, direction)) for s in (1, -1)]
    return float(ends[0] - ends[1]) / (2 * eps)


def dot(a, b):
    return float(optax.tree.vdot(a, b))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (patches, Rules("hinge")),
        (patches, Rules("non_saturating", r1=0.7, augment=("color", "translation", "cutout"))),
        (projection, Rules("relativistic", r1=0.3, r2=0.5)),
    ],
)
def test_each_gradient_is_that_of_finite_differences_and_leaves_the_other_network_alone(make, rules):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        score, shapes, shape = make(rng)
        params, direction = (jax.tree.map(lambda s: rng.normal(size=s.shape), shapes) for _ in range(2))
        real, fake, towards = rng.normal(size=(3, BATCH, *shape))

        @jax.jit
        def losses(params, fake):
            both = contest(score, params, real, fake, keys(BATCH), rules)
            return both.generator, both.discriminator

        @jax.jit
        def total(params, fake):  # as a stage adds them up
            both = contest(score, params, real, fake, keys(BATCH), rules)
            return with_gradient(2.0 * both.generator, 2.0 * both.gradient, fake) + both.discriminator

        value, (by_params, by_fake) = jax.value_and_grad(total, (0, 1))(params, fake)
        assert by_fake.dtype == np.float64
        generator, discriminator = losses(params, fake)
        np.testing.assert_allclose(value, 2.0 * generator + discriminator, rtol=1e-12)
        expected = along(lambda fake: losses(params, fake)[0], fake, towards)
        np.testing.assert_allclose(dot(by_fake, towards), 2.0 * expected, rtol=1e-5)
        assert abs(expected) > 1e-4
        expected = along(lambda params: losses(params, fake)[1], params, direction)
        np.testing.assert_allclose(dot(by_params, direction), expected, rtol=1e-5)
        assert abs(expected) > 1e-3


def test_penalties_are_squared_gradients():
    """Of a discriminator <w, x>, whose gradient is w everywhere."""
    w, x = jnp.asarray([3.0, 4.0]), jnp.ones((2, 1, 1, 2))
    run = lambda rules: contest(lambda w, x: (x * w).sum((1, 2, 3)), w, x, 0 * x, keys(2), rules)  # noqa: E731
    plain, both = run(Rules("hinge")), run(Rules("hinge", r1=0.5, r2=0.25))
    np.testing.assert_allclose(both.discriminator - plain.discriminator, (0.5 + 0.25) * 25 / 2, rtol=1e-6)
    np.testing.assert_allclose([both.metrics["r1"], both.metrics["r2"]], 12.5)


def test_the_adaptive_weight_makes_two_gradients_of_a_layer_equally_long():
    h = jnp.asarray([[1.0, 2.0]])
    _, pullback = jax.vjp(lambda last: h @ last, jnp.ones((2, 3)))
    first, second = jnp.asarray([[3.0, 0.0, 4.0]]), jnp.asarray([[0.0, 0.5, 0.0]])
    np.testing.assert_allclose(adaptive_weight(pullback, first, second), 10.0, rtol=1e-3)
    np.testing.assert_allclose(adaptive_weight(pullback, first, 0 * second), 1e4)  # and no more


# --- two optimizers


def test_the_discriminator_has_an_optimizer_of_its_own():
    rng = np.random.default_rng(0)
    drawn = jnp.asarray(rng.normal(size=(2, 2, 4, 4)), jnp.float32)
    weights, grads = ({"vae_decoder": {"kernel": x[0]}, "discriminator": {"kernel": x[1]}} for x in drawn)
    own = {"learning_rate": 0.2, "b1": 0.0, "b2": 0.5, "weight_decay": 0.1, "clip_norm": 0.3}
    changed = {f"discriminator_{name}": value for name, value in own.items()}
    steps = {}
    for case, tx in (
        ("both", optimizer(options(learning_rate=0.1, ema_sigmas=(0.1,), **changed))),
        ("vae_decoder", optimizer(options(learning_rate=0.1))),
        ("unet", optimizer(options(**own))),
    ):
        # What is alone is clipped by its own norm alone, whatever the other's.
        name = {"unet": "discriminator"}.get(case, case)
        chosen = [weights, grads] if case == "both" else [{case: tree[name]} for tree in (weights, grads)]
        steps[case], state = tx.update(chosen[1], tx.init(chosen[0]), chosen[0])
        if case == "both":  # the average is of both, in one place, where the snapshots look for it
            leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PowerAverages))
            (average,) = (x for x in leaves if isinstance(x, PowerAverages))
            assert average.averages[0].keys() == weights.keys()
    np.testing.assert_allclose(
        steps["both"]["vae_decoder"]["kernel"], steps["vae_decoder"]["vae_decoder"]["kernel"], rtol=1e-6
    )
    np.testing.assert_allclose(steps["both"]["discriminator"]["kernel"], steps["unet"]["unet"]["kernel"], rtol=1e-6)


# --- augmentation


def test_translation_moves_an_image_and_zeros_come_in():
    image = jnp.arange(1.0, 65.0).reshape(8, 8, 1)
    found = {np.asarray(translation(image, key)).tobytes() for key in keys(40)}
    moved = set()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
            moved.add(padded[1 + dy : 9 + dy, 1 + dx : 9 + dx].tobytes())
    assert found <= moved
    assert len(found) > 5


def test_cutout_removes_one_square():
    for key in keys(20):
        hole = np.asarray(cutout(jnp.ones((8, 8, 2)), key))[..., 0] == 0
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns)  # a rectangle, a square but at the border
        assert len(rows) in (2, 3, 4)
        assert np.ptp(rows) + 1 == len(rows)


def test_augmentations_are_of_each_example_by_its_key():
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
    compiled = jax.jit(augment, static_argnums=2)
    whole = compiled(images, keys(), NAMES)
    np.testing.assert_allclose(compiled(images[1:3], keys()[1:3], NAMES), whole[1:3], atol=1e-6)
    assert not np.allclose(whole, images)
    np.testing.assert_array_equal(augment(images, keys(), ()), images)
