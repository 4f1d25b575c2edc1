"""Training of an autoencoder's decoder alone, against a discriminator or to tolerate the denoiser's errors.

The latents do not change, so that a trained denoiser stays valid.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.consistency import solver_step
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import at, noise_schedule
from jaxdiff.models.clip import CLIPEncoder
from jaxdiff.models.model import Model, apply, scaled, unscaled, with_time_ids
from jaxdiff.sampling.denoiser import denoiser
from jaxdiff.training.adversarial import Rules, adaptive_weight, contest, stop, with_gradient
from jaxdiff.training.loop import Stage
from jaxdiff.training.losses import SCALES, batch_psnr, reconstruction_loss
from jaxdiff.training.options import RedrawOptions
from jaxdiff.training.stages import (
    clip_pixels,
    compute_dtypes,
    conditioning,
    fold_in_each,
    per_example,
    prepare_pairs,
    unconditional,
)
from jaxdiff.training.train_step import Batch, Metrics, split_state
from jaxdiff.typing import Array, Key, Params

DECODER = ("decoder", "post_quant_conv")  # parts of an autoencoder after the latents
DEFAULT_RULES = Rules()
AS_ENCODED = RedrawOptions()
LAST = ("decoder", "conv_out", "kernel")  # the last layer, at which gradients are compared


def split_decoder(params: Params) -> Params:
    """All parameters, with the decoder's under "vae_decoder" and the encoder's under "vae"."""
    vae = params["vae"]
    decoder = {name: x for name, x in vae.items() if name in DECODER}
    return {**params, "vae": {name: x for name, x in vae.items() if name not in DECODER}, "vae_decoder": decoder}


def merge_decoder(params: Params) -> Params:
    """The reverse of `split_decoder`, without the discriminator."""
    rest = {name: x for name, x in params.items() if name not in ("vae_decoder", "discriminator")}
    return {**rest, "vae": {**params["vae"], **params["vae_decoder"]}}


def decode_with(model: Model, decoder: Params, z: Array, last: Array) -> Array:
    """The images of latents, decoded with another kernel in the decoder's last layer."""
    conv_out = {**decoder["decoder"]["conv_out"], "kernel": last}
    decoder = {**decoder, "decoder": {**decoder["decoder"], "conv_out": conv_out}}
    return apply(model, {"vae": decoder}, "vae", z, method="decode")


def feature_distance(model: Model, params: Params, x: Array, images: Array) -> Array:
    """Distance between images in [-1, 1] in the features of the model's vision encoder, over all layers and positions.

    The mean squared difference between unit-length features (Zhang et al. 2018, equation 1, unweighted).
    """
    assert model.vision_encoder is not None
    size, variables = model.vision_encoder.config.image_size, {"params": params["vision_encoder"]}

    def features(x: Array) -> list[Array]:
        pixels = clip_pixels(127.5 * (x + 1.0), size)
        _, captured = model.vision_encoder.apply(  # type: ignore[union-attr]
            variables, pixels, capture_intermediates=lambda module, _: isinstance(module, CLIPEncoder)
        )
        layers = captured["intermediates"]["encoder"]["__call__"][0]
        return [h / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-6) for h in layers]

    pairs = zip(features(x), features(images), strict=True)
    return jnp.stack([((a - b).astype(jnp.float32) ** 2).sum(-1).mean() for a, b in pairs]).mean()


def redraw_latents(
    model: Model, params: Params, latents: Array, batch: Batch, keys: Key, options: RedrawOptions
) -> Array:
    """Latents noised to a random level up to `options.strength`, and denoised by the model and their captions.

    A decoder trained on them learns to tolerate a denoiser's errors (after the noise-augmented decoding of Zheng et al.
    2025, arXiv 2510.11690, section 4, which adds plain noise).

    Args:
        latents: [B, h, w, C], scaled.
        batch: the captions, as `prepare_pairs` makes them.
    """
    schedule, empty = noise_schedule(model.scheduler), prepare_pairs(model)({"text": [""]})
    cond = with_time_ids(model, conditioning(model, params, batch, empty, jnp.zeros(len(latents), bool)), latents)
    scale = options.guidance_scale or model.options.guidance_scale
    uncond = unconditional(model, params, empty, len(latents)) if scale > 1 else None
    denoise = denoiser(model, params, cond, uncond, scale)
    u = per_example(jax.random.uniform, keys, ())
    first_time = options.strength * u * (model.scheduler.num_train_timesteps - 1)
    noise = per_example(jax.random.normal, fold_in_each(keys, 1), latents.shape[1:])

    def step(x: Array, i: Array) -> tuple[Array, Array]:
        time, next_time = (at(schedule, jnp.floor(first_time * (1 - j / options.steps))) for j in (i, i + 1))
        x0 = denoise(x, time)
        return solver_step(x0, x, time, next_time), x0

    x = add_noise(latents, noise, at(schedule, jnp.floor(first_time)))
    return stop(jax.lax.scan(step, x, jnp.arange(options.steps))[1][-1])


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
    redraw: RedrawOptions = AS_ENCODED,
) -> Stage:
    """The decoder against a discriminator of its images (Rombach et al. 2022, section 3.1); the encoder is frozen.

    Needs `split_decoder` and the discriminator's parameters as "discriminator", which are trained beside the decoder's,
    from the first update on.

    Args:
        weight: of the adversarial loss, times `adaptive_weight` if `adaptive`; 0 leaves the discriminator out.
        start: updates before the adversarial loss reaches the decoder.
        edge_weight: see `reconstruction_loss`.
        feature_weight: of `feature_distance`.
        redraw: how latents are changed before they are decoded, see `redraw_latents`.
    """

    def reconstruction(params: Params, x: Array, images: Array) -> tuple[Array, Metrics]:
        value = reconstruction_loss(x, images, edge_weight, SCALES)
        metrics = {"reconstruction": value}
        if not feature_weight:
            return value, metrics
        metrics["features"] = feature_distance(model, params, x, images)
        return value + feature_weight * metrics["features"], metrics

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        params, state = split_state(params)
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = apply(model, params, "vae", images, method="encode")
        if redraw.strength:
            z = redraw_latents(model, params, scaled(model, params, mean), batch, fold_in_each(keys, 2), redraw)
            z = unscaled(model, params, z)
        else:
            z = stop(mean + jnp.exp(0.5 * logvar) * per_example(jax.random.normal, keys, mean.shape[1:]))
        decoder = params["vae_decoder"]
        if not weight:
            x = apply(model, {"vae": decoder}, "vae", z, method="decode")
            value, metrics = reconstruction(params, x, images)
            return value, {**metrics, "psnr": batch_psnr(x, images)}
        last_kernel: Any = decoder
        for name in LAST:
            last_kernel = last_kernel[name]
        x, pullback = jax.vjp(lambda last_kernel: decode_with(model, decoder, z, last_kernel), last_kernel)

        (value, metrics), gradient = jax.value_and_grad(reconstruction, 1, has_aux=True)(stop(params), stop(x), images)
        value = with_gradient(value, gradient, x)

        def score(params: Params, x: Array) -> Array:
            return discriminator.apply({"params": params}, x)  # type: ignore[return-value]

        losses = contest(score, params["discriminator"], images, x, fold_in_each(keys, 1), rules)
        factor = weight * (adaptive_weight(lambda g: pullback(g)[0], gradient, losses.gradient) if adaptive else 1.0)
        factor = jnp.where(state["step"] < start, 0.0, factor)
        total = value + with_gradient(factor * losses.generator, factor * losses.gradient, x) + losses.discriminator
        return total, {**metrics, **losses.metrics, "weight": factor, "psnr": batch_psnr(x, images)}

    dtypes = compute_dtypes(model)
    dtypes = {**dtypes, "vae_decoder": dtypes["vae"], "discriminator": jnp.dtype(discriminator.dtype)}  # type: ignore[attr-defined]
    trainable = ("vae_decoder", "discriminator")
    prepare = prepare_pairs(model) if redraw.strength else lambda batch: {"image": batch["image"]}
    return Stage("vae_decoder", trainable, loss, prepare, dtypes, reads_state=True)
