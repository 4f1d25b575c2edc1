"""Metrics of a model during training, on held-out images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.diffusion.diffusion_loss import diffusion_loss
from jaxdiff.diffusion.prediction import add_noise
from jaxdiff.diffusion.schedules import at, noise_schedule
from jaxdiff.models.model import Model, decode, encode, with_time_ids
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.training.stages import (
    Network,
    clip_embeddings,
    conditioning,
    fold_in_each,
    latents_of,
    per_example,
    plain_network,
)
from jaxdiff.training.train_step import Batch
from jaxdiff.typing import PRNG, Array, Params


def for_each(run: Callable[[Any], Any], batches: Sequence[Any]) -> Any:
    """Map `run` over batches, trees of arrays [b, ...], and concatenate its outputs [b, ...] as numpy arrays [N, ...].

    Batches smaller than the first are padded, so that `run` is compiled once.
    """
    batch_size, outputs = len(jax.tree.leaves(batches[0])[0]), []
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        rows = np.minimum(np.arange(batch_size), size - 1)
        output = run(jax.tree.map(lambda x, rows=rows: x[rows], batch))
        outputs.append(jax.tree.map(lambda x, size=size: np.asarray(x)[:size], output))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def psnr(x: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio of each image, in dB: [B, H, W, C] in [0, 1] -> [B]."""
    return -10 * jnp.log10(jnp.maximum(((x - target) ** 2).mean((1, 2, 3)), 1e-10))


def reconstructions(model: Model, batches: Sequence[np.ndarray]):
    """A function params -> (images after the autoencoder uint8 [N, H, W, 3], their mean PSNR in dB).

    Args:
        batches: images uint8 [b, H, W, 3], encoded and decoded one batch at a time.
    """

    @jax.jit
    def run(vae: Params, images: Array) -> tuple[Array, Array]:
        x = images.astype(jnp.float32) / 255.0
        y = decode(model, {"vae": vae}, encode(model, {"vae": vae}, x))
        return jnp.round(255 * y).astype(jnp.uint8), psnr(x, y)

    def evaluate(params: Params) -> tuple[np.ndarray, dict[str, float]]:
        vae = jax.device_put(params["vae"])
        images, psnr = for_each(lambda images: run(vae, images), batches)
        return images, {"eval_psnr": float(psnr.mean())}

    return evaluate


def enlargements(module: RRDBNet, batches: Sequence[Mapping[str, Any]]):
    """A function params -> (images uint8 [N, H, W, 3], {"eval_psnr", "eval_psnr_bicubic"}): dB against the originals.

    Args:
        batches: of images and their small, damaged versions, as the stage "super_resolution" prepares them.
    """

    @jax.jit
    def run(upscaler: Params, batch: Batch) -> tuple[Array, Array, Array]:
        image, small = (jnp.asarray(batch[name], jnp.float32) / 255.0 for name in ("image", "hint"))
        x: Any = module.apply({"params": upscaler}, small)
        x, bicubic = jnp.clip(x, 0.0, 1.0), jnp.clip(jax.image.resize(small, image.shape, "cubic"), 0.0, 1.0)
        return jnp.round(255 * x).astype(jnp.uint8), psnr(x, image), psnr(bicubic, image)

    def evaluate(params: Params) -> tuple[np.ndarray, dict[str, float]]:
        upscaler = jax.device_put(params["upscaler"])
        images, psnr_values, bicubic = for_each(lambda batch: run(upscaler, batch), batches)
        return images, {"eval_psnr": float(psnr_values.mean()), "eval_psnr_bicubic": float(bicubic.mean())}

    return evaluate


def retrieval(model: Model, batches: Sequence[Mapping[str, Any]]):
    """A function params -> {"eval_accuracy"}: how often an image's caption is the most similar of all captions.

    A caption that several images share is one candidate, which is right for all of them.
    """
    pairs = [(batch["image"], batch["tokens"]) for batch in batches]
    candidates, caption_ids = np.unique(np.concatenate([tokens for _, tokens in pairs]), axis=0, return_inverse=True)
    caption_ids = caption_ids.reshape(-1)
    first = [int(np.flatnonzero(caption_ids == i)[0]) for i in range(len(candidates))]
    run = jax.jit(lambda params, images, tokens: clip_embeddings(model, params, images, tokens))

    def evaluate(params: Params) -> dict[str, float]:
        encoders = jax.device_put({k: params[k] for k in ("text_encoder", "vision_encoder")})
        images, texts = for_each(lambda pair: run(encoders, *pair), pairs)
        texts = texts[first] / np.linalg.norm(texts[first], axis=-1, keepdims=True)
        return {"eval_accuracy": float((np.argmax(images @ texts.T, 1) == caption_ids).mean())}

    return evaluate


def noise_levels(
    model: Model,
    batches: Sequence[Mapping[str, Any]],
    *,
    network: Network | None = None,
    merge_params: Callable[[Params], Params] = lambda params: params,
    levels: int = 10,
    seed: int = 0,
):
    """A function params -> {"eval_loss", "eval_loss_t050", …}: the denoiser's squared error at several times.

    The times are the centres of `levels` equal parts of [0, T), weighted equally; no caption is dropped. The noise of
    an image, and random masks and other noise of the network, depend on the image's number alone, so that two values
    differ only by the parameters.

    Args:
        batches: at least one, as the stage prepares them; computed one after the other.
        network, merge_params: see `diffusion_stage`; params are what `merge_params` takes.
    """
    schedule, denoise = noise_schedule(model.scheduler), network or plain_network(model)
    num_timesteps = model.scheduler.num_train_timesteps
    times = (np.arange(levels) + 0.5) * num_timesteps / levels  # [levels]
    names = [f"eval_loss_t{round(t):03d}" for t in times]

    ends = np.cumsum([len(batch["tokens"]) for batch in batches])
    numbered = [(np.arange(end - len(b["tokens"]), end), dict(b)) for end, b in zip(ends, batches, strict=True)]

    @jax.jit
    def run(params: Params, numbers: Array, batch: Batch) -> Array:  # [B, levels]
        params = merge_params(params)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed, impl=PRNG), i))(numbers)
        x0 = latents_of(model, params, batch)
        drop = jnp.zeros(len(x0), bool)  # no caption is dropped
        cond = with_time_ids(model, conditioning(model, params, batch, batch, drop), x0)
        eps = per_example(jax.random.normal, keys, x0.shape[1:])

        def at_time(t: Array) -> Array:
            time = at(schedule, jnp.full(len(x0), jnp.floor(t)))
            output = denoise(params, add_noise(x0, eps, time), time, cond, batch, fold_in_each(keys, 1))
            return diffusion_loss(output, x0, eps, time, model.scheduler.prediction_type, None)

        return jax.lax.map(at_time, jnp.asarray(times, jnp.float32)).T

    def evaluate(params: Params) -> dict[str, float]:
        placed = jax.device_put(params)
        values = for_each(lambda numbers_and_batch: run(placed, *numbers_and_batch), numbered).mean(0)
        return {"eval_loss": float(values.mean()), **dict(zip(names, map(float, values), strict=True))}

    return evaluate
