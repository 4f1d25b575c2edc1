"""An autoencoder's decoder alone, sharpened by an adversary: the latents stay what they are."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.models.clip import CLIPEncoder
from jaxdiff.models.model import Model, apply
from jaxdiff.training.adversarial import Rules, adaptive_weight, contest, stop, with_gradient
from jaxdiff.training.loop import Stage
from jaxdiff.training.losses import SCALES, batch_psnr, reconstruction_loss
from jaxdiff.training.stages import clip_pixels, compute_dtypes, fold_in_each, per_example
from jaxdiff.training.train_step import STATE, Batch, Metrics
from jaxdiff.typing import Array, Key, Params

DECODER = ("decoder", "post_quant_conv")  # parts of an autoencoder that come after the latents
DEFAULT_RULES = Rules()
LAST = ("decoder", "conv_out", "kernel")  # the last layer, at which gradients are compared


def split_decoder(params: Params) -> Params:
    """All parameters with the decoder's apart, as "vae_decoder"; "vae" keeps the encoder's."""
    vae = params["vae"]
    decoder = {name: x for name, x in vae.items() if name in DECODER}
    return {**params, "vae": {name: x for name, x in vae.items() if name not in DECODER}, "vae_decoder": decoder}


def merge_decoder(params: Params) -> Params:
    """The reverse of `split_decoder`, without what no model draws with."""
    rest = {name: x for name, x in params.items() if name not in ("vae_decoder", "discriminator")}
    return {**rest, "vae": {**params["vae"], **params["vae_decoder"]}}


def decode_with(model: Model, decoder: Params, z: Array, last: Array) -> Array:
    """Images of latents by a decoder with another kernel of its last layer."""
    conv_out = {**decoder["decoder"]["conv_out"], "kernel": last}
    decoder = {**decoder, "decoder": {**decoder["decoder"], "conv_out": conv_out}}
    return apply(model, {"vae": decoder}, "vae", z, method="decode")


def feature_distance(model: Model, params: Params, x: Array, images: Array) -> Array:
    """How far apart images in [-1, 1] are for the model's vision encoder, at every layer and position.

    The mean square of the differences between features of length 1 (Zhang et al. 2018, equation 1, unweighted).
    """
    assert model.vision_encoder is not None
    size, tower = model.vision_encoder.config.image_size, {"params": params["vision_encoder"]}

    def states(x: Array) -> list[Array]:
        pixels = clip_pixels(127.5 * (x + 1.0), size)
        _, seen = model.vision_encoder.apply(  # type: ignore[union-attr]
            tower, pixels, capture_intermediates=lambda module, _: isinstance(module, CLIPEncoder)
        )
        layers = seen["intermediates"]["encoder"]["__call__"][0]
        return [h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-6) for h in layers]

    pairs = zip(states(x), states(images), strict=True)
    return jnp.stack([((a - b).astype(jnp.float32) ** 2).sum(-1).mean() for a, b in pairs]).mean()


def vae_decoder_stage(
    model: Model,
    discriminator: Any,
    *,
    rules: Rules = DEFAULT_RULES,
    weight: float = 0.5,
    adaptive: bool = True,
    start: int = 0,
    edge_weight: float = 1.0,
    feature_weight: float = 0.0,
) -> Stage:
    """The decoder against a discriminator of its images (Rombach et al. 2022, section 3.1); the encoder is left alone.

    Needs `split_decoder` and the discriminator's parameters as "discriminator", which are trained beside the decoder's,
    from the first update on.

    Args:
        weight: of the adversary, times `adaptive_weight` where `adaptive`.
        start: updates before the decoder hears the discriminator.
        edge_weight: see `reconstruction_loss`.
        feature_weight: of `feature_distance`.
    """

    def reconstructed(params: Params, x: Array, images: Array) -> tuple[Array, Metrics]:
        pixels = reconstruction_loss(x, images, edge_weight, SCALES)
        metrics = {"reconstruction": pixels}
        if not feature_weight:
            return pixels, metrics
        metrics["features"] = feature_distance(model, params, x, images)
        return pixels + feature_weight * metrics["features"], metrics

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        params, step = {k: x for k, x in params.items() if k != STATE}, params[STATE]["step"]
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = apply(model, params, "vae", images, method="encode")
        z = stop(mean + jnp.exp(0.5 * logvar) * per_example(jax.random.normal, keys, mean.shape[1:]))
        decoder = params["vae_decoder"]
        last: Any = decoder
        for name in LAST:
            last = last[name]
        x, pullback = jax.vjp(lambda last: decode_with(model, decoder, z, last), last)

        (value, metrics), gradient = jax.value_and_grad(reconstructed, 1, has_aux=True)(stop(params), stop(x), images)
        value = with_gradient(value, gradient, x)

        def score(params: Params, x: Array) -> Array:
            return discriminator.apply({"params": params}, x)  # type: ignore[return-value]

        both = contest(score, params["discriminator"], images, x, fold_in_each(keys, 1), rules)
        factor = weight * (adaptive_weight(lambda g: pullback(g)[0], gradient, both.gradient) if adaptive else 1.0)
        factor = jnp.where(step < start, 0.0, factor)
        total = value + with_gradient(factor * both.generator, factor * both.gradient, x) + both.discriminator
        return total, {**metrics, **both.metrics, "weight": factor, "psnr": batch_psnr(x, images)}

    dtypes = compute_dtypes(model)
    dtypes = {**dtypes, "vae_decoder": dtypes["vae"], "discriminator": jnp.dtype(discriminator.dtype)}  # type: ignore[attr-defined]
    trainable = ("vae_decoder", "discriminator")
    return Stage("vae_decoder", trainable, loss, lambda batch: {"image": batch["image"]}, dtypes, reads_state=True)
