"""The stages of a text-to-image model: CLIP and the autoencoder, then the denoiser, which needs both."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.diffusion_loss import diffusion_loss
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import Time, at, is_flow, noise_schedule, shift_time
from jaxdiff.models.clip import CLIP_MEAN, CLIP_STD
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import Model, apply, encode, with_time_ids
from jaxdiff.models.text_encoding import encode_text
from jaxdiff.text.chunks import Tokens, tokens
from jaxdiff.training.loop import Stage
from jaxdiff.training.losses import SCALES, batch_psnr, contrastive_loss, kl_divergence, reconstruction_loss
from jaxdiff.training.options import NoiseOptions
from jaxdiff.training.train_step import NO_CAST, Batch, Dtypes, Metrics
from jaxdiff.typing import Array, Key, Params

MAX_LOGIT_SCALE = float(np.log(100.0))  # Radford et al. 2021, section 2.5
FIRST_LOGIT_SCALE = float(np.log(1 / 0.07))


def per_example(sample, keys: Key, shape: tuple[int, ...]) -> Array:
    """`sample(key, shape, dtype)` for each example's key: [B, *shape] float32."""
    return jax.vmap(lambda key: sample(key, shape, jnp.float32))(keys)


def compute_dtypes(model: Model) -> Dtypes:
    """The dtype that each network computes in, by the key of its parameters."""
    networks = [*model.modules.items(), *(("controlnet", net) for net in model.controlnets)]
    return {name: network.dtype for name, network in networks}


# --- CLIP: which image goes with which caption


def clip_params(params: Params) -> Params:
    """The parameters with the learned temperature of contrastive training."""
    return {**params, "logit_scale": jnp.asarray(FIRST_LOGIT_SCALE, jnp.float32)}


def clip_pixels(images: Array, size: int) -> Array:
    """Images uint8 [B, H, W, 3] -> normalised float32 [B, size, size, 3]."""
    x = jnp.asarray(images, jnp.float32) / 255.0
    if x.shape[1:3] != (size, size):
        x = jax.image.resize(x, (len(x), size, size, 3), "bilinear")
    return (x - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)


def clip_embeddings(model: Model, params: Params, images: Array, tokens: Array) -> tuple[Array, Array]:
    """Images uint8 [B, H, W, 3] and tokens [B, L] -> float32 [B, P] each; cosines between them are scores."""
    assert model.vision_encoder is not None
    pixels = clip_pixels(images, model.vision_encoder.config.image_size)
    image = apply(model, params, "vision_encoder", pixels)
    text = apply(model, params, "text_encoder", tokens)
    text = text.pooled if text.projected is None else text.projected
    return image.astype(jnp.float32), text.astype(jnp.float32)


def clip_stage(model: Model) -> Stage:
    """Contrastive training of text and vision encoder (Radford et al. 2021, section 2.3).

    Needs `clip_params`. Equal captions within a batch are not negatives of each other.
    """

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        images, texts = clip_embeddings(model, params, batch["image"], batch["tokens"])
        scale = jnp.exp(jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE))
        same = (batch["tokens"][:, None] == batch["tokens"][None]).all(-1)
        value, accuracy = contrastive_loss(images, texts, scale, same)
        return value, {"accuracy": accuracy, "logit_scale": scale}

    trainable = ("text_encoder", "vision_encoder", "logit_scale")
    return Stage("clip", trainable, loss, prepare_pairs(model), compute_dtypes(model))


TOKENS = ("tokens", "tokens_2", "tokens_3", "tokens_mask")  # what the model's text encoders read
PASSED_THROUGH = ("image", "hint", "time_ids", "weight")  # arrays of a batch that losses read unchanged


def prepare_pairs(model: Model):
    """A function from batches with "text" to batches with token ids int32 [b, L] of each text encoder instead.

    For transformers with Qwen3 also "tokens_mask" float32 [b, L], 0 where the tokens are padding.
    """
    tokenizers = [t for t in (model.tokenizer, model.tokenizer_2) if t is not None]

    def tokens_of(texts: list[str]) -> dict[str, Any]:
        if model.transformer is None:
            return {name: tokenizer(texts) for name, tokenizer in zip(TOKENS, tokenizers, strict=False)}
        token_ids = tokens(model, texts)
        arrays = (token_ids.ids, token_ids.ids_2, token_ids.ids_3, token_ids.attention_mask)
        return {name: x for name, x in zip(TOKENS, arrays, strict=True) if x is not None}

    def prepare(batch: Mapping[str, Any]) -> Batch:
        return {name: batch[name] for name in PASSED_THROUGH if name in batch} | tokens_of(list(batch["text"]))

    return prepare


# --- the autoencoder


def vae_stage(model: Model, *, kl_weight: float = 1e-3, edge_weight: float = 1.0, scales: int = SCALES) -> Stage:
    """The autoencoder: reconstruction of pixels and edges, and a weak Gaussian prior on the latents.

    (Kingma & Welling 2014; Rombach et al. 2022, section 3.1, without its adversary.)

    Args:
        kl_weight: weight of the KL divergence, a mean over the elements of the latents.
        edge_weight, scales: see `reconstruction_loss`.
    """

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = apply(model, params, "vae", images, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * per_example(jax.random.normal, keys, mean.shape[1:])
        x = apply(model, params, "vae", z, method="decode")
        reconstruction = reconstruction_loss(x, images, edge_weight, scales)
        kl = kl_divergence(mean, logvar)
        metrics = {"reconstruction": reconstruction, "kl": kl, "psnr": batch_psnr(x, images)}
        return reconstruction + kl_weight * kl, metrics

    return Stage("vae", ("vae",), loss, lambda batch: {"image": batch["image"]}, compute_dtypes(model))


# --- the UNet

Network = Callable[[Params, Array, Time, Conditioning, Batch, Key], Array]  # see `plain_network`


def plain_network(model: Model, guidance: float = 1.0) -> Network:
    """The UNet or transformer by itself: (params, x [B, h, w, C], time, conditioning, batch, keys [B]) -> [B, h, w, C].

    Args:
        guidance: the scale that is passed to guidance-distilled transformers, such as FLUX.1 dev.
    """
    if model.transformer is not None:

        def network(params: Params, x: Array, time: Time, cond: Conditioning, batch: Batch, keys: Key) -> Array:
            guidance_scales = jnp.full(len(x), guidance, jnp.float32)
            inputs = cond.embeddings, cond.pooled, cond.attention_mask, guidance_scales
            return apply(model, params, "transformer", x, time.t, *inputs).astype(jnp.float32)

        return network
    return lambda params, x, time, cond, batch, keys: apply(model, params, "unet", x, time.t, *cond)


def diffusion_stage(
    model: Model,
    *,
    trainable: Sequence[str] = ("unet",),
    name: str = "unet",
    network: Network | None = None,
    merge_params: Callable[[Params], Params] | None = None,
    **noise_options: Any,
) -> Stage:
    """Latent diffusion conditioned on text (Rombach et al. 2022, equation 3), as the model's scheduler config says.

    Batches hold the tokens [B, L] of each text encoder, "tokens" and for SDXL "tokens_2", and either "image" uint8
    [B, H, W, 3], which the frozen autoencoder encodes, or "latents" [B, h, w, C]. They may also hold "time_ids"
    [B, 6] (SDXL; by default those of uncropped images), "weight" [B] of each example's loss, and precomputed
    "embeddings" [B, L, D] and "pooled" [B, P], which replace the encoding of the tokens.

    Args:
        trainable: "unet" and any text encoders that are trained too; or other keys that `merge_params` uses.
        name: of the stage.
        network: the denoiser; `plain_network` by default.
        merge_params: all parameters -> those of the model's modules, for adapters that are merged into them.
        noise_options: fields of `NoiseOptions`.
    """
    options, schedule = NoiseOptions(**noise_options), noise_schedule(model.scheduler)
    network = network or plain_network(model)
    empty = prepare_pairs(model)({"text": [""]})

    def loss(params: Params, batch: Batch, keys: Key) -> tuple[Array, Metrics]:
        params = params if merge_params is None else merge_params(params)
        time_keys, noise_keys, drop_keys = split_each(keys, 3)
        x0 = latents_of(model, params, batch)
        drop = per_example(jax.random.uniform, drop_keys, ()) < options.caption_dropout
        cond = with_time_ids(model, conditioning(model, params, batch, empty, drop), x0)
        eps = random_noise(noise_keys, x0.shape[1:], options.offset_noise)
        time = at(schedule, random_times(model.scheduler, time_keys, options))
        noise = eps
        if options.input_perturbation:
            noise += options.input_perturbation * random_noise(fold_in_each(noise_keys, 2), x0.shape[1:])
        output = network(params, add_noise(x0, noise, time), time, cond, batch, fold_in_each(keys, 1))
        errors = diffusion_loss(output, x0, eps, time, model.scheduler.prediction_type, options.min_snr_gamma or None)
        return (errors * batch.get("weight", 1.0)).mean(), {}

    # Adapters are merged in the dtype of the parameters.
    dtypes = compute_dtypes(model) if merge_params is None else NO_CAST
    return Stage(name, tuple(trainable), loss, prepare_diffusion(model), dtypes)


def fold_in_each(keys: Key, number: int) -> Key:
    """Independent keys [B], derived from `keys` and `number`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def split_each(keys: Key, count: int) -> Key:
    """`jax.random.split` of each of keys [B]: [count, B]."""
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0)


def conditioning(model: Model, params: Params, batch: Batch, empty: Batch, drop: Array) -> Conditioning:
    """The conditioning on the captions, or on the empty prompt (SDXL: zeros) where `drop`, bool [B], is true."""
    if "embeddings" in batch:  # precomputed
        uncond = unconditional(model, params, empty)

        def select(precomputed: Array, unconditional: Array) -> Array:
            return jnp.where(
                drop.reshape(-1, *[1] * (precomputed.ndim - 1)), unconditional, precomputed.astype(unconditional.dtype)
            )

        pooled = None if uncond.pooled is None else select(batch["pooled"], uncond.pooled)
        mask = batch.get("tokens_mask")
        if mask is not None and uncond.attention_mask is not None:
            mask = jnp.where(drop[:, None], uncond.attention_mask, mask)
        return Conditioning(select(batch["embeddings"], uncond.embeddings), pooled, batch.get("time_ids"), mask)
    ids = {name: jnp.where(drop[:, None], empty[name], batch[name]) for name in TOKENS if name in batch}
    is_sdxl = model.unet is not None and model.tokenizer_2 is not None
    zeros = drop if is_sdxl and model.options.force_zeros_for_empty_prompt else None
    cond = encode_text(model, params, as_tokens(ids)._replace(zeros=zeros))
    return cond._replace(time_ids=batch.get("time_ids"))


def unconditional(model: Model, params: Params, empty: Batch, count: int = 1) -> Conditioning:
    """The conditioning on the empty prompt, as in `conditioning`, for `count` examples."""
    uncond = conditioning(model, params, empty, empty, jnp.ones(1, bool))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), uncond)


def as_tokens(batch: Batch) -> Tokens:
    """The tokens in a batch."""
    ids_2, ids_3, mask = (batch.get(name) for name in TOKENS[1:])
    return Tokens(batch["tokens"], ids_2=ids_2, ids_3=ids_3, attention_mask=mask)


def random_times(scheduler: SchedulerConfig, keys: Key, options: NoiseOptions | None = None) -> Array:
    """Random timesteps, float32 [B]: integers in [0, T), for flows reals in [0, T]; uniform by default."""
    options, num_timesteps = options or NoiseOptions(), scheduler.num_train_timesteps
    if options.times == "uniform":
        u = per_example(jax.random.uniform, keys, ())
    else:
        u = jax.nn.sigmoid(options.logit_mean + options.logit_std * per_example(jax.random.normal, keys, ()))
    if is_flow(scheduler):
        return shift_time(num_timesteps * u, scheduler)
    return jnp.minimum(jnp.floor(num_timesteps * u), num_timesteps - 1)


def random_noise(keys: Key, shape: tuple[int, ...], offset: float = 0.0) -> Array:
    """Unit Gaussian noise [B, *shape], plus `offset` times noise that is constant over each channel."""
    noise = per_example(jax.random.normal, keys, shape)
    if not offset:
        return noise
    return noise + offset * per_example(jax.random.normal, fold_in_each(keys, 1), (*[1] * (len(shape) - 1), shape[-1]))


def latents_of(model: Model, params: Params, batch: Batch) -> Array:
    """Scaled latents [B, h, w, C] float32; no gradient flows into the autoencoder."""
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    return jax.lax.stop_gradient(encode(model, params, batch["image"].astype(jnp.float32) / 255.0))


def prepare_diffusion(model: Model):
    """`prepare_pairs` for batches of images and captions; batches of latents and tokens pass unchanged."""
    prepare = prepare_pairs(model)
    return lambda batch: batch if "latents" in batch else prepare(batch)
