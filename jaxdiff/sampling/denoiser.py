"""The network, its conditions and its guidance as one function (x, time) -> prediction of the clean latents x0."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.diffusion.guidance import classifier_free, in_interval, perturbed, rescale
from jaxdiff.diffusion.prediction import to_denoised
from jaxdiff.diffusion.schedules import Time, at, noise_schedule
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.controlnet import combine
from jaxdiff.models.layers import timestep_embedding
from jaxdiff.models.model import Model, apply, in_unit, with_time_ids
from jaxdiff.models.perturbed import perturbed_attention
from jaxdiff.typing import Array, Denoise, Params

NEGATIVE_SCORE = 2.5  # aesthetic score that the SDXL refiner gets with the negative prompt


def denoiser(
    model: Model,
    params: Params,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    guidance_scale: Array | float = 1.0,
    *,
    guidance_rescale: Array | float | None = None,
    guidance_interval: tuple[Array | float, Array | float] | None = None,
    pag_scale: Array | float | None = None,
    pag_layers: Sequence[str] = ("mid",),
    extra_channels: Array | None = None,
    class_labels: Array | int | None = None,
    control_images: Sequence[Array] = (),
    controlnet_scale: Sequence[Array | float] = (),
) -> Denoise:
    """The network as a function (x, time) -> prediction of the clean latents x0, guided by the text.

    Args:
        model, params: the model and its parameters.
        cond: conditioning of B images, as `encode_text` returns it. SDXL's time ids default to an uncropped image of
            the size drawn.
        uncond: the same for the negative prompts; None draws without guidance, at half the cost.
        guidance_scale: w of x = uncond + w (cond - uncond) (Ho & Salimans 2022, equation 6), scalar or [B];
            values below 1 count as 1. A distilled UNet gets w - 1 as an input instead (Luo et al. 2023, LCM, section
            4.3); leave its `uncond` None.
        guidance_rescale: how far, 0 to 1, the guided output is rescaled to the standard deviation of the conditional
            one; scalar or [B].
        guidance_interval: (low, high) of sigma / alpha: guidance is on for low < sigma / alpha <= high.
        pag_scale: weight of perturbed-attention guidance (Ahn et al. 2024), scalar or [B], which takes another pass of
            the UNet without self-attention in some layers; None does without.
        pag_layers: those layers, see `perturbed_attention`.
        extra_channels: [B, h, w, c] that follow x's channels: an inpainting model's mask and masked latents, an
            upscaler's small image.
        class_labels: int32 scalar or [B], for a UNet with class embeddings: the upscaler's noise level.
        control_images: for each of the model's ControlNets an image [B, H, W, 3], float in [0, 1] or integer in
            [0, 255].
        controlnet_scale: for each ControlNet its weight, scalar or [B]; empty: 1 for all.

    Returns:
        denoise(x [B, h, w, C], time) -> float32 [B, h, w, C]; `time` is a `Time`, or a timestep in training steps,
        scalar or [B]. With `uncond`, both predictions are made in one batch of 2 B.
    """
    schedule = noise_schedule(model.scheduler)
    if model.family == "z_image":  # c + g (c - u), as its pipeline has it
        guidance_scale = 1.0 + jnp.asarray(guidance_scale)
    guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, pag_scale)
    hints = [in_unit(x) for x in control_images]

    def repeat(x: Array) -> Array:
        return jnp.concatenate([x] * (1 if uncond is None else 2))

    def denoise(x: Array, time: Time | Array | float) -> Array:
        time = time if isinstance(time, Time) else at(schedule, time)
        conds = with_time_ids(model, cond, x)
        if uncond is not None:
            conds = concat_conditionings(conds, with_time_ids(model, uncond, x, NEGATIVE_SCORE))
        x_in, labels, guidance_embeds, control_residual = repeat(x), None, None, None
        t = repeat(time.t) if jnp.ndim(time.t) else jnp.asarray(time.t)
        if model.transformer is not None:
            guidance_input = guidance_scale if uncond is None else None
            return to_x0(transformer_output(model, params, x_in, t, conds, guidance_input), x, time)
        if hints:
            control_residual = control_residuals(model, params, (x_in, t, conds), hints, controlnet_scale)
        if extra_channels is not None:
            x_in = jnp.concatenate([x_in, repeat(extra_channels)], -1)
        if class_labels is not None:
            labels = repeat(jnp.broadcast_to(class_labels, (len(x),)))
        if model.unet.config.time_cond_proj_dim is not None:
            guidance_embeds = repeat(guidance_embedding(guidance_scale, len(x), model.unet.config.time_cond_proj_dim))
        inputs = x_in, t, *conds, labels, guidance_embeds, control_residual
        output = apply(model, params, "unet", *inputs)
        perturbed_out = None if pag_scale is None else perturbed_output(model, params, inputs, len(x), pag_layers)
        return to_x0(output.astype(jnp.float32), x, time, perturbed_out)

    def to_x0(output: Array, x: Array, time: Time, perturbed_out: Array | None = None) -> Array:
        guided = apply_guidance(output, perturbed_out, len(x), time, guidance)
        return to_denoised(guided, x, time, model.scheduler.prediction_type)

    return denoise


def transformer_output(
    model: Model, params: Params, x: Array, t: Array, cond: Conditioning, guidance_scale: Array | float | None
) -> Array:
    """The velocity float32 [B, h, w, C] that a transformer predicts for x at timesteps t, scalar or [B].

    Args:
        guidance_scale: input of FLUX.1 dev's guidance embedding, scalar or [B]; None if guidance takes a second pass.
    """
    guidance = None
    if guidance_scale is not None:
        guidance = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), (len(x),))
    cond_inputs = cond.embeddings, cond.pooled, cond.attention_mask, guidance
    return apply(model, params, "transformer", x, jnp.broadcast_to(t, (len(x),)), *cond_inputs).astype(jnp.float32)


def control_residuals(
    model: Model,
    params: Params,
    inputs: tuple[Array, Array, Conditioning],
    hints: Sequence[Array],
    scales: Sequence[Array | float],
) -> Any:
    """What the ControlNets add to the UNet's features.

    Args:
        inputs: (x, t, cond) of the UNet, for B or 2 B images.
        hints: for each ControlNet its images [B, H, W, 3] in [0, 1].
        scales: for each ControlNet its weight, scalar or [B]; empty: 1 for all.
    """
    x, t, cond = inputs

    def repeat(values: Array, batch: int) -> Array:
        return jnp.concatenate([values] * (len(x) // batch))

    controlnets = zip(model.controlnets, params["controlnet"], hints, strict=True)
    outputs = [
        net.apply({"params": p}, x, t, cond.embeddings, repeat(hint, len(hint)), *cond[1:])
        for net, p, hint in controlnets
    ]
    weights = zip(scales if len(scales) else [1.0] * len(hints), hints, strict=True)
    return combine(outputs, [repeat(jnp.broadcast_to(s, (len(hint),)), len(hint)) for s, hint in weights])


def perturbed_output(model: Model, params: Params, inputs: Any, batch: int, layers: Sequence[str]) -> Array:
    """The UNet's output float32 [B, h, w, C] for the first B of its inputs, with these layers perturbed."""
    cond_inputs = jax.tree.map(lambda x: x[:batch] if jnp.ndim(x) else x, inputs)
    with perturbed_attention(layers):
        return apply(model, params, "unet", *cond_inputs).astype(jnp.float32)


def concat_conditionings(*conds: Conditioning) -> Conditioning:
    """Several conditionings concatenated along the batch; one without a mask gets ones if another has a mask."""
    if any(c.attention_mask is not None for c in conds):
        conds = tuple(
            c._replace(attention_mask=jnp.ones(c.embeddings.shape[:2])) if c.attention_mask is None else c
            for c in conds
        )
    return jax.tree.map(lambda *fields: jnp.concatenate(fields), *conds)


class Guidance(NamedTuple):
    """How predictions are combined; see `denoiser`."""

    scale: Array | float
    rescale: Array | float | None
    interval: tuple[Array | float, Array | float] | None
    pag_scale: Array | float | None


def apply_guidance(output: Array, perturbed_out: Array | None, batch: int, time: Time, guidance: Guidance) -> Array:
    """One prediction [B, ...] from the outputs of the network.

    Args:
        output: with the prompts, [B, ...], or with the prompts and the negative prompts, [2 B, ...].
        perturbed_out: with the prompts and perturbed layers, [B, ...]; None: no perturbed-attention guidance.
        batch: B.
    """
    conditional, negative = output[:batch], output[batch:]
    prediction = conditional
    if len(negative):
        scale = jnp.maximum(guidance.scale, 1.0)
        if guidance.interval is not None:
            scale = jnp.where(in_interval(time, *guidance.interval), scale, 1.0)
        prediction = classifier_free(conditional, negative, scale)
    if guidance.pag_scale is not None and perturbed_out is not None:
        prediction = perturbed(prediction, conditional, perturbed_out, guidance.pag_scale)
    if len(negative) and guidance.rescale is not None:
        prediction = rescale(prediction, conditional, guidance.rescale)
    return prediction


def guidance_embedding(scale: Array | float, batch: int, dim: int) -> Array:
    """The guidance embedding of a distilled UNet: sinusoids [B, dim] of 1000 (scale - 1); scale is scalar or [B]."""
    weight = 1000.0 * (jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (batch,)) - 1)
    return timestep_embedding(weight, dim, flip_sin_to_cos=False, freq_shift=1)
