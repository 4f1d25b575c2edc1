"""How good the encoders are while they are trained, on pictures set aside."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.model import Model, decode, encode
from jaxdiff.training.stages import clip_embeddings
from jaxdiff.typing import Array, Params


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
