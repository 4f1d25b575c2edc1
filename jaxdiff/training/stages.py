"""The stages of a text-to-image model: CLIP and the autoencoder, then the UNet, which needs both."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.losses import diffusion_loss
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import at, is_flow, noise_schedule, shift_time
from jaxdiff.models.model import Model, apply, encode, encode_text
from jaxdiff.training.loop import Stage
from jaxdiff.training.losses import contrastive_loss, kl_divergence, reconstruction_loss
from jaxdiff.training.state import Batch, Metrics
from jaxdiff.typing import Array, Key, Params

# Of the pixels that CLIP was trained on (Radford et al. 2021), by which its vision encoder's input is normalised.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = float(np.log(100.0))  # section 2.5
FIRST_LOGIT_SCALE = float(np.log(1 / 0.07))


def each(draw, keys: Key, shape: tuple[int, ...]) -> Array:
    """One draw an example: [B, *shape] of `draw(key, shape)`."""
    return jax.vmap(lambda key: draw(key, shape))(keys)


# --- CLIP: which picture goes with which caption


def clip_params(params: Params) -> Params:
    """With the temperature that contrastive training learns beside the encoders."""
    return {**params, "logit_scale": jnp.asarray(FIRST_LOGIT_SCALE, jnp.float32)}


def clip_pixels(images: Array, size: int) -> Array:
    """Pictures uint8 [B, H, W, 3] -> normalised float32 [B, size, size, 3]."""
    x = jnp.asarray(images, jnp.float32) / 255.0
    if x.shape[1:3] != (size, size):
        x = jax.image.resize(x, (len(x), size, size, 3), "bilinear")
    return (x - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)


def clip_embeddings(model: Model, params: Params, images: Array, tokens: Array) -> tuple[Array, Array]:
    """Pictures uint8 [B, H, W, 3] and tokens [B, L] -> float32 [B, P] each; cosines between them are scores."""
    assert model.vision_encoder is not None
    pixels = clip_pixels(images, model.vision_encoder.config.image_size)
    image = apply(model, params, "vision_encoder", pixels)
    text = apply(model, params, "text_encoder", tokens)
    text = text.pooled if text.projected is None else text.projected
    return image.astype(jnp.float32), text.astype(jnp.float32)


def clip_stage(model: Model) -> Stage:
    """Text and vision encoder together, by contrast within the batch (Radford et al. 2021, section 2.3).

    Needs `clip_params`. Captions that are equal within a batch are not each other's negatives.
    """

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        images, texts = clip_embeddings(model, params, batch["image"], batch["tokens"])
        scale = jnp.exp(jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE))
        same = (batch["tokens"][:, None] == batch["tokens"][None]).all(-1)
        value, accuracy = contrastive_loss(images, texts, scale, same)
        return value, {"accuracy": accuracy, "logit_scale": scale}

    return Stage("clip", ("text_encoder", "vision_encoder", "logit_scale"), loss, prepare_pairs(model))


def prepare_pairs(model: Model):
    """{"image", "text"} as the folder gives them -> {"image": uint8 [b, H, W, 3], "tokens": int32 [b, L]}."""

    tokenizer = model.tokenizer
    assert tokenizer is not None  # but for the SDXL refiner, which is not trained here

    def prepare(batch: Mapping[str, Any]) -> Batch:
        return {"image": batch["image"], "tokens": tokenizer(list(batch["text"]))}

    return prepare


# --- the autoencoder


def vae_stage(model: Model, *, kl_weight: float = 1e-3, edge_weight: float = 1.0, scales: int = 3) -> Stage:
    """The autoencoder: reconstruction of pixels and edges, and a Gaussian prior of small weight on the latents.

    (Kingma & Welling 2014; Rombach et al. 2022, section 3.1, without its adversary.)

    Args:
        kl_weight: of the divergence, a mean over the elements of the latents.
        edge_weight, scales: see `reconstruction_loss`.
    """

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = apply(model, params, "vae", images, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * each(jax.random.normal, keys, mean.shape[1:])
        x = apply(model, params, "vae", z, method="decode")
        reconstruction = reconstruction_loss(x, images, edge_weight, scales)
        kl = kl_divergence(mean, logvar)
        error = ((x - images) ** 2).mean()
        psnr = 10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))  # dB; the range of [-1, 1] is 2
        return reconstruction + kl_weight * kl, {"reconstruction": reconstruction, "kl": kl, "psnr": psnr}

    return Stage("vae", ("vae",), loss, lambda batch: {"image": batch["image"]})


# --- the UNet


def diffusion_stage(
    model: Model,
    *,
    trainable: Sequence[str] = ("unet",),
    caption_dropout: float = 0.1,
    min_snr_gamma: float = 0.0,
) -> Stage:
    """Latent diffusion conditioned on text (Rombach et al. 2022, equation 3), as the model's scheduler config says.

    Batches hold "tokens" [B, L] and either "image" uint8 [B, H, W, 3], encoded by the frozen autoencoder, or "latents"
    [B, h, w, C] that are already.

    Args:
        trainable: "unet", and "text_encoder" if it is to learn as well.
        caption_dropout: share of examples that see the empty prompt instead, which guidance needs (Ho & Salimans 2022,
            algorithm 1).
        min_snr_gamma: bounds the weight of easy times (Hang et al. 2023, equation 5; 5 in the paper). 0 weighs all
            alike, as a v-prediction with zero terminal signal-to-noise wants it: there the bound is a weight of 0.
    """
    schedule = noise_schedule(model.scheduler)
    assert model.tokenizer is not None
    empty = model.tokenizer([""])  # [1, L]

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        time_keys, noise_keys, drop_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
        drop = each(jax.random.uniform, drop_keys, ()) < caption_dropout
        cond = encode_text(model, params, jnp.where(drop[:, None], empty, batch["tokens"]))
        x0 = latents_of(model, params, batch)
        eps = each(jax.random.normal, noise_keys, x0.shape[1:])
        time = at(schedule, random_times(model.scheduler, time_keys))
        x = add_noise(x0, eps, time)
        output = apply(model, params, "unet", x, time.t, *cond)
        return diffusion_loss(output, x0, eps, time, model.scheduler.prediction_type, min_snr_gamma or None).mean(), {}

    return Stage("unet", tuple(trainable), loss, prepare_diffusion(model))


def random_times(scheduler: SchedulerConfig, keys: Key) -> Array:
    """A uniform time an example, float32 [B]: of the T steps, or of the continuum [0, T] that a flow is."""
    steps = scheduler.num_train_timesteps
    u = each(jax.random.uniform, keys, ())
    return shift_time(steps * u, scheduler) if is_flow(scheduler) else jnp.floor(steps * u)


def latents_of(model: Model, params: Params, batch: Batch) -> Array:
    """Scaled latents [B, h, w, C] float32; no gradient flows into the autoencoder."""
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    return jax.lax.stop_gradient(encode(model, params, batch["image"].astype(jnp.float32) / 255.0))


def prepare_diffusion(model: Model):
    """Batches with pictures and captions as for CLIP; cached ones, which hold latents and tokens, as they are."""
    pairs = prepare_pairs(model)
    return lambda batch: batch if "latents" in batch else pairs(batch)
