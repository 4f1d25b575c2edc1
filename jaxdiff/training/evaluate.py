"""How good a model is while it is trained, on pictures set aside."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.losses import diffusion_loss
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import at, noise_schedule
from jaxdiff.models.model import Model, decode, encode, with_time_ids
from jaxdiff.training.stages import (
    Network,
    clip_embeddings,
    conditioning,
    each,
    folded,
    latents_of,
    plain_network,
)
from jaxdiff.training.state import Batch
from jaxdiff.typing import Array, Key, Params


def reconstructions(model: Model, images: np.ndarray):
    """A function params -> (pictures after the autoencoder uint8 [B, H, W, 3], their mean PSNR in dB)."""

    @jax.jit
    def run(vae: Params, images: Array) -> tuple[Array, Array]:
        x = images.astype(jnp.float32) / 255.0
        y = decode(model, {"vae": vae}, encode(model, {"vae": vae}, x))
        errors = jnp.maximum(((x - y) ** 2).mean((1, 2, 3)), 1e-10)
        return jnp.round(255 * y).astype(jnp.uint8), -10 * jnp.log10(errors).mean()

    def evaluate(params: Params) -> tuple[np.ndarray, dict[str, float]]:
        pictures, psnr = run(params["vae"], images)
        return np.asarray(pictures), {"eval_psnr": float(psnr)}

    return evaluate


def retrieval(model: Model, batches: Sequence[Mapping[str, Any]]):
    """A function params -> {"eval_accuracy"}: how often a picture's caption is the most similar of all captions.

    Captions that several pictures share are one candidate, so that any of the pictures may find it.
    """
    images = [batch["image"] for batch in batches]
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    candidates, own = np.unique(tokens, axis=0, return_inverse=True)
    run = jax.jit(lambda params, images, tokens: clip_embeddings(model, params, images, tokens))

    def evaluate(params: Params) -> dict[str, float]:
        encoders = {k: params[k] for k in ("text_encoder", "vision_encoder")}
        pairs = [run(encoders, b["image"], b["tokens"]) for b in batches]
        pictures, texts = (np.concatenate([np.asarray(pair[i]) for pair in pairs]) for i in range(2))
        first = [int(np.flatnonzero(own.reshape(-1) == i)[0]) for i in range(len(candidates))]
        texts = texts[first] / np.linalg.norm(texts[first], axis=-1, keepdims=True)
        found = np.argmax(pictures @ texts.T, 1)
        return {"eval_accuracy": float((found == own.reshape(-1)).mean())}

    assert len(images)
    return evaluate


def noise_levels(
    model: Model,
    batches: Sequence[Mapping[str, Any]],
    *,
    network: Network | None = None,
    levels: int = 10,
    seed: int = 0,
):
    """A function params -> {"eval_loss", "eval_loss_t050", …}: the UNet's squared error at each of some times.

    The times are the middles of `levels` equal parts of [0, T); every caption is kept and no time weighs more than
    another. Each picture has the same noise at all times and whenever it is asked, so that two values differ by the
    parameters alone; so are masks and other noise that a network draws.

    Args:
        batches: as the UNet's stage prepares them, at least one.
        network: what denoises, see `diffusion_stage`.
    """
    schedule, denoise = noise_schedule(model.scheduler), network or plain_network(model)
    total = model.scheduler.num_train_timesteps
    times = (np.arange(levels) + 0.5) * total / levels  # [levels]
    names = [f"eval_loss_t{round(t):03d}" for t in times]

    @jax.jit
    def run(params: Params, batch: Batch, keys: Key) -> Array:  # [levels]: sums over the batch
        x0 = latents_of(model, params, batch)
        kept = jnp.zeros(len(x0), bool)  # no caption is dropped
        cond = with_time_ids(model, conditioning(model, params, batch, batch, kept), x0)
        eps = each(jax.random.normal, keys, x0.shape[1:])

        def at_time(t: Array) -> Array:
            time = at(schedule, jnp.full(len(x0), jnp.floor(t)))
            output = denoise(params, add_noise(x0, eps, time), time, cond, batch, folded(keys, 1))
            return diffusion_loss(output, x0, eps, time, model.scheduler.prediction_type, None).sum()

        return jax.lax.map(at_time, jnp.asarray(times, jnp.float32))

    def evaluate(params: Params) -> dict[str, float]:
        kept = jax.device_put({name: params[name] for name in (*model.modules, "controlnet") if name in params})
        sums, count = np.zeros(levels), 0
        for i, batch in enumerate(batches):
            size = len(batch["tokens"])
            sums += run(kept, dict(batch), jax.random.split(jax.random.fold_in(jax.random.key(seed), i), size))
            count += size
        values = sums / count
        return {"eval_loss": float(values.mean()), **dict(zip(names, map(float, values), strict=True))}

    return evaluate
