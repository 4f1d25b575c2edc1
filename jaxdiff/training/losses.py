"""Losses other than `jaxdiff.diffusion.diffusion_loss`. All are means over a batch."""

import jax
import jax.numpy as jnp

from jaxdiff.typing import Array

SCALES = 3  # sizes of an image that `reconstruction_loss` compares


def contrastive_loss(images: Array, texts: Array, scale: Array, same_caption: Array) -> tuple[Array, Array]:
    """Symmetric cross-entropy of matching images with captions (Radford et al. 2021, figure 3).

    Args:
        images, texts: embeddings [B, P] of pairs, of any length (they are normalised here).
        scale: the inverse temperature, by which cosines are multiplied.
        same_caption: bool [B, B], pairs with equal captions, which are left out as negatives.

    Returns:
        The loss, and the accuracy of finding the caption of an image within the batch.
    """
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    diagonal = jnp.eye(len(images), dtype=bool)
    logits = jnp.where(same_caption & ~diagonal, -jnp.inf, scale * images @ texts.T)
    by_image, by_text = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    loss = -(jnp.diagonal(by_image) + jnp.diagonal(by_text)).mean() / 2
    accuracy = (jnp.argmax(logits, 1) == jnp.arange(len(logits))).mean()
    return loss, accuracy


def kl_divergence(mean: Array, logvar: Array) -> Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of a diagonal Gaussian, a mean over elements (Kingma & Welling 2014, B)."""
    return 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).mean()


def batch_psnr(x: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio in dB of images [B, H, W, C] in [-1, 1], over the whole batch: a scalar."""
    return 10 * jnp.log10(4.0 / jnp.maximum(((x - target) ** 2).mean(), 1e-10))


def _halve(x: Array) -> Array:
    """Images [B, H, W, C] at half the size, each pixel the mean of four."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _differences(x: Array) -> tuple[Array, Array]:
    """Differences to the neighbour below and to the right, which show edges."""
    return x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]


def reconstruction_loss(x: Array, target: Array, edge_weight: float = 1.0, scales: int = SCALES) -> Array:
    """Absolute error of pixels and of edges, averaged over `scales` sizes of the image, each half the last.

    The error of the differences between neighbours (Mathieu et al. 2016, equation 6) penalises a blurred edge more than
    a shifted tone, as perception does; the smaller sizes keep tones correct over large areas.

    Args:
        x, target: [B, H, W, C]; H and W multiples of 2 ** (scales - 1), and at least twice that.
    """
    error = x - target
    total = jnp.zeros(())
    for scale in range(scales):
        error = _halve(error) if scale else error
        down, right = _differences(error)
        # Differences are linear: the error of the edges is the edges of the error.
        total += jnp.abs(error).mean() + edge_weight * (jnp.abs(down).mean() + jnp.abs(right).mean())
    return total / scales
