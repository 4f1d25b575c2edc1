"""A text-conditional GAN of latents; generator and discriminator both read the text.

Huang et al. 2024 (R3GAN) use the relativistic loss, both penalties at every step, and networks without norms. Each
real example is paired with one generated for the same text.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import GeneratorConfig, SchedulerConfig
from jaxdiff.models.discriminator import ProjectionDiscriminator
from jaxdiff.models.generator import TextConditionalGenerator, text_state
from jaxdiff.models.model import Model, apply, unet_inputs
from jaxdiff.training.adversarial import Rules, contest, stop, with_gradient
from jaxdiff.training.checks import image_size
from jaxdiff.training.loop import Stage
from jaxdiff.training.options import OptionsError
from jaxdiff.training.stages import (
    compute_dtypes,
    conditioning,
    fold_in_each,
    latents_of,
    per_example,
    prepare_diffusion,
    prepare_pairs,
    random_noise,
)
from jaxdiff.training.train_step import Batch, Metrics
from jaxdiff.typing import PRNG, Array, Key, Params

# One step from pure noise returns the network's output.
SCHEDULER = SchedulerConfig.from_dict(
    {
        "_class_name": "DDIMScheduler",
        "prediction_type": "sample",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
)


def check_divisible(name: str, side: int, layers: int) -> None:
    """Raise OptionsError unless the side of the latents is divisible by 2 ** layers."""
    if side % 2**layers:
        raise OptionsError(f"{name} {layers}: the images have {side} latents along a side, which is not divisible by "
                           f"{2**layers}; lower it.")  # fmt: skip


def gan_model(config: Any, model: Model, params: Params) -> tuple[Model, Params]:
    """The model with a fresh generator in place of its UNet; a model with a generator keeps it.

    Raises:
        OptionsError: the model needs more than a prompt, or sizes do not fit each other.
    """
    if model.unet is None or model.inpaints or model.family == "upscaler" or model.controlnets:
        raise OptionsError("init_from.model: a GAN is made of a model with a UNet that draws from a prompt alone.")
    side, sizes = image_size(config, model) // model.vae.config.factor, config.generator
    check_divisible("adversary.layers", side, config.adversary.layers)
    if model.is_gan:
        if side != model.sample_size:
            pixels = model.sample_size * model.vae.config.factor
            raise OptionsError(f"data.image_size must be {pixels}, the only size that init_from.model draws.")
        return model, params
    check_divisible("generator.layers", side, sizes.layers)
    generator_config = GeneratorConfig(
        sample_size=side,
        in_channels=model.vae.config.latent_channels,
        block_out_channels=tuple(sizes.features * 2**i for i in range(sizes.layers + 1)),
        layers_per_block=sizes.blocks,
        num_attention_heads=sizes.heads,
        cross_attention_dim=model.unet.config.cross_attention_dim,
        noise_dim=sizes.noise_dim,
        style_dim=sizes.style_dim,
    )
    if generator_config.block_out_channels[0] * 2 % sizes.heads:
        raise OptionsError(f"generator.heads {sizes.heads} must divide twice generator.features {sizes.features}.")
    generator = TextConditionalGenerator(generator_config, model.unet.remat, model.unet.dtype)
    options = dataclasses.replace(model.options, steps=1, guidance_scale=1.0, pag_scale=0.0)
    model = dataclasses.replace(model, unet=generator, scheduler=SCHEDULER, options=options)
    inputs = (x if x is None else jnp.zeros(x.shape, x.dtype) for x in unet_inputs(model))
    generator_params = jax.jit(generator.init)(jax.random.key(config.seed, impl=PRNG), *inputs)["params"]
    return model, {**params, "unet": generator_params}


def gan_discriminator(config: Any, model: Model) -> tuple[ProjectionDiscriminator, Params]:
    """A fresh discriminator of the model's latents and texts."""
    settings, generator = config.adversary, model.unet.config
    widths = tuple(settings.features * 2**i for i in range(settings.layers + 1))
    net = ProjectionDiscriminator(widths, dtype=model.unet.dtype)
    x = jnp.zeros((1, generator.sample_size, generator.sample_size, generator.in_channels))
    key = jax.random.fold_in(jax.random.key(config.seed, impl=PRNG), 1)
    return net, jax.jit(net.init)(key, x, jnp.zeros((1, generator.cross_attention_dim)))["params"]


def gan_stage(model: Model, discriminator: Any, *, rules: Rules, caption_dropout: float = 0.0) -> Stage:
    """Adversarial training of the generator, which takes the UNet's place, and of params["discriminator"].

    Batches are those of `diffusion_stage`.

    Args:
        rules: of the adversarial loss.
        caption_dropout: share of examples that get the empty prompt.
    """
    empty = prepare_pairs(model)({"text": [""]})

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        latents = latents_of(model, params, batch)
        drop = per_example(jax.random.uniform, fold_in_each(keys, 2), ()) < caption_dropout
        cond = stop(conditioning(model, params, batch, empty, drop))
        noise = random_noise(fold_in_each(keys, 3), latents.shape[1:])
        fake = apply(model, params, "unet", noise, None, *cond)
        text = text_state(cond.embeddings, cond.attention_mask)

        def score(params: Params, x: Array) -> Array:
            return discriminator.apply({"params": params}, x, text)  # type: ignore[return-value]

        losses = contest(score, params["discriminator"], latents, fake, fold_in_each(keys, 1), rules)
        total = with_gradient(losses.generator, losses.gradient, fake) + losses.discriminator
        return total, {**losses.metrics, "deviation": fake.std()}

    dtypes = {**compute_dtypes(model), "discriminator": jnp.dtype(discriminator.dtype)}
    return Stage("gan", ("unet", "discriminator"), loss, prepare_diffusion(model), dtypes)
