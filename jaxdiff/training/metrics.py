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
    """What `run` returns, arrays [b, ...], of all batches (trees of arrays [b, ...]) together as numpy arrays [N, ...].

    A batch smaller than the first is padded, so that one compiled program serves all.
    """
    full, found = len(jax.tree.leaves(batches[0])[0]), []
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        rows = np.minimum(np.arange(full), size - 1)
        out = run(jax.tree.map(lambda x, rows=rows: x[rows], batch))
        found.append(jax.tree.map(lambda x, size=size: np.asarray(x)[:size], out))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def psnr(x: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio of each image, in dB: [B, H, W, C] in [0, 1] -> [B]."""
    return -10 * jnp.log10(jnp.maximum(((x - target) ** 2).mean((1, 2, 3)), 1e-10))


def reconstructions(model: Model, batches: Sequence[np.ndarray]):
    """A function params -> (images after the autoencoder uint8 [N, H, W, 3], their mean PSNR in dB).

    Args:
        batches: images uint8 [b, H, W, 3], taken through the autoencoder one batch after the other.
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
        x, plain = jnp.clip(x, 0.0, 1.0), jnp.clip(jax.image.resize(small, image.shape, "cubic"), 0.0, 1.0)
        return jnp.round(255 * x).astype(jnp.uint8), psnr(x, image), psnr(plain, image)

    def evaluate(params: Params) -> tuple[np.ndarray, dict[str, float]]:
        upscaler = jax.device_put(params["upscaler"])
        images, values, plain = for_each(lambda batch: run(upscaler, batch), batches)
        return images, {"eval_psnr": float(values.mean()), "eval_psnr_bicubic": float(plain.mean())}

    return evaluate


def retrieval(model: Model, batches: Sequence[Mapping[str, Any]]):
    """A function params -> {"eval_accuracy"}: how often an image's caption is the most similar of all captions.

    Captions that several images share are one candidate, so that any of the images may find it.
    """
    pairs = [(batch["image"], batch["tokens"]) for batch in batches]
    candidates, own = np.unique(np.concatenate([tokens for _, tokens in pairs]), axis=0, return_inverse=True)
    own = own.reshape(-1)
    first = [int(np.flatnonzero(own == i)[0]) for i in range(len(candidates))]
    run = jax.jit(lambda params, images, tokens: clip_embeddings(model, params, images, tokens))

    def evaluate(params: Params) -> dict[str, float]:
        encoders = jax.device_put({k: params[k] for k in ("text_encoder", "vision_encoder")})
        images, texts = for_each(lambda pair: run(encoders, *pair), pairs)
        texts = texts[first] / np.linalg.norm(texts[first], axis=-1, keepdims=True)
        return {"eval_accuracy": float((np.argmax(images @ texts.T, 1) == own).mean())}

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
    """A function params -> {"eval_loss", "eval_loss_t050", …}: the UNet's squared error at each of some times.

    The times are the middles of `levels` equal parts of [0, T); every caption is kept and no time weighs more than
    another. Each image has the same noise at all times, whenever it is asked and whatever batch it is in, so that two
    values differ by the parameters alone; so are masks and other noise that a network draws.

    Args:
        batches: as the UNet's stage prepares them, at least one; computed one after the other.
        network, merge_params: see `diffusion_stage`; params are what `merge_params` takes.
    """
    schedule, denoise = noise_schedule(model.scheduler), network or plain_network(model)
    total = model.scheduler.num_train_timesteps
    times = (np.arange(levels) + 0.5) * total / levels  # [levels]
    names = [f"eval_loss_t{round(t):03d}" for t in times]

    ends = np.cumsum([len(batch["tokens"]) for batch in batches])
    numbered = [(np.arange(end - len(b["tokens"]), end), dict(b)) for end, b in zip(ends, batches, strict=True)]

    @jax.jit
    def run(params: Params, numbers: Array, batch: Batch) -> Array:  # [B, levels]
        params = merge_params(params)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed, impl=PRNG), i))(numbers)
        x0 = latents_of(model, params, batch)
        kept = jnp.zeros(len(x0), bool)  # no caption is dropped
        cond = with_time_ids(model, conditioning(model, params, batch, batch, kept), x0)
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
