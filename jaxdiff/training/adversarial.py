"""Adversarial losses of a generator G and a discriminator D.

With scores D(x) of real and D(G(z)) of generated examples, f(t) = log(1 + exp(t)), means over scores, and each loss
without a gradient into the other network:

    hinge           L_D = (E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))) / 2,   L_G = -E D(G(z))               (1)
    non_saturating  L_D = (E f(-D(x)) + E f(D(G(z)))) / 2,                    L_G = E f(-D(G(z)))            (2)
    relativistic    L_D = E f(D(G(z)) - D(x)),                                L_G = E f(D(x) - D(G(z)))      (3)

    L_D += r1 / 2 E |grad_x sum D(x)|^2 + r2 / 2 E |grad_G(z) sum D(G(z))|^2                                 (4)

(1) Lim & Ye 2017, as Esser et al. 2021 train autoencoders; (2) Goodfellow et al. 2014, section 3; (3) Jolicoeur-
Martineau 2019, each real example paired with one that is generated; (4) Mescheder et al. 2018, equation 9. Huang et
al. 2024 join (3) and (4). Since neither loss has a gradient into the other network, the gradient of their sum is the
gradient of each: one train step serves both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.training.augment import augment
from jaxdiff.training.stages import fold_in_each
from jaxdiff.training.train_step import Metrics
from jaxdiff.typing import Array, Key, Params

Score = Callable[[Params, Array], Array]  # (parameters of D, images or latents [B, H, W, C]) -> scores [B, ...]
stop = jax.lax.stop_gradient
MAX_WEIGHT, NORM_EPS = 1e4, 1e-4  # of `adaptive_weight`, as taming-transformers has them


class Rules(NamedTuple):
    """Options of the adversarial loss."""

    loss: str = "hinge"  # of LOSSES
    r1: float = 0.0  # weights of the penalties (4)
    r2: float = 0.0
    augment: tuple[str, ...] = ()  # names of `jaxdiff.training.augment.AUGMENTATIONS`, in this order


class Contest(NamedTuple):
    """The losses of both networks for one batch."""

    generator: Array  # L_G, a value without a gradient
    gradient: Array  # of L_G with respect to the generated examples [B, H, W, C]; see `with_gradient`
    discriminator: Array  # L_D, whose gradient goes to D's parameters alone
    metrics: Metrics


def _hinge(real: Array, fake: Array) -> tuple[Array, Array]:
    return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2, -fake.mean()


def _non_saturating(real: Array, fake: Array) -> tuple[Array, Array]:
    f = jax.nn.softplus
    return (f(-real).mean() + f(fake).mean()) / 2, f(-fake).mean()


def _relativistic(real: Array, fake: Array) -> tuple[Array, Array]:
    f = jax.nn.softplus
    return f(fake - real).mean(), f(real - fake).mean()


# (scores of real examples, of generated ones) -> (L_D, L_G)
LOSSES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "hinge": _hinge,
    "non_saturating": _non_saturating,
    "relativistic": _relativistic,
}


def gradient_penalty(score: Callable[[Array], Array], x: Array) -> Array:
    """E |grad_x sum D(x)|^2 / 2 of equation (4); its own gradient goes through the gradient once more."""
    gradient = jax.grad(lambda x: score(x).sum())(x)
    return (gradient**2).sum((1, 2, 3)).mean() / 2


def contest(score: Score, params: Params, real: Array, fake: Array, keys: Key, rules: Rules) -> Contest:
    """Both losses of a batch.

    Args:
        score: applies the discriminator.
        params: its parameters.
        real, fake: [B, H, W, C].
        keys: [B], of the augmentations.
    """
    loss_fn, keys_real, keys_fake = LOSSES[rules.loss], fold_in_each(keys, 1), fold_in_each(keys, 2)
    real, fake = stop(real), stop(fake)

    def score_real(x: Array) -> Array:
        return score(params, augment(x, keys_real, rules.augment))

    def score_fake(params: Params, x: Array) -> Array:
        return score(params, augment(x, keys_fake, rules.augment))

    scores, scores_fake = score_real(real), score_fake(params, fake)
    discriminator = loss_fn(scores, scores_fake)[0]
    metrics = {"score_real": scores.mean(), "score_fake": scores_fake.mean()}
    if rules.r1:
        metrics["r1"] = gradient_penalty(score_real, real)
        discriminator += rules.r1 * metrics["r1"]
    if rules.r2:
        metrics["r2"] = gradient_penalty(lambda x: score_fake(params, x), fake)
        discriminator += rules.r2 * metrics["r2"]
    generator, gradient = jax.value_and_grad(lambda x: loss_fn(stop(scores), score_fake(stop(params), x))[1])(fake)
    metrics |= {"generator": generator, "discriminator": discriminator}
    return Contest(stop(generator), stop(gradient), discriminator, stop(metrics))


def with_gradient(value: Array, gradient: Array, x: Array) -> Array:
    """A scalar equal to `value` whose gradient with respect to x is `gradient`, both computed before."""
    return stop(value) + (stop(gradient) * (x - stop(x))).sum()


def adaptive_weight(pullback: Callable[[Array], Any], first: Array, second: Array) -> Array:
    """The weight at which a second loss moves a network's last layer as much as the first (Esser et al. 2021).

    lambda = |grad_L first| / (|grad_L second| + delta)     (their equation 7)

    Args:
        pullback: maps a gradient of the network's output to one of its last layer L, as `jax.vjp` returns it.
        first, second: gradients of the two losses with respect to the output.
    """
    first_norm, second_norm = (optax.tree.norm(pullback(stop(gradient))) for gradient in (first, second))
    return stop(jnp.minimum(first_norm / (second_norm + NORM_EPS), MAX_WEIGHT))
