"""Latents of a whole folder, encoded once and drawn from memory: no decoding of pictures while the UNet is trained."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxdiff.models.model import Model, encode
from jaxdiff.typing import Params


def fingerprint(model: Model, params: Params, description: Any) -> str:
    """Of all that cached latents depend on: the autoencoder, the tokenizer, and what `description` (JSON) says."""
    assert model.tokenizer is not None
    digest = hashlib.sha256(json.dumps([str(model.vae.config), model.tokenizer.digest, description]).encode())
    for leaf in jax.tree.leaves(params["vae"]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def encode_all(model: Model, params: Params, batches: Iterable[Mapping[str, Any]], log_every: int = 20) -> dict:
    """Run batches {"image", "text"} through the frozen autoencoder.

    Returns:
        {"latents": float16 [N, h, w, C], "tokens": uint16 or int32 [N, L]}.
    """
    assert model.tokenizer is not None
    run = jax.jit(lambda vae, images: encode(model, {"vae": vae}, images.astype(np.float32) / 255.0))
    vae = jax.device_put(params["vae"])
    latents, tokens, count = [], [], 0
    for i, batch in enumerate(batches):
        latents.append(np.asarray(run(vae, batch["image"])).astype(np.float16))
        tokens.append(model.tokenizer(list(batch["text"])))
        count += len(tokens[-1])
        if i % log_every == 0:
            logging.info("%d pictures encoded.", count)
    return {"latents": np.concatenate(latents), "tokens": np.concatenate(tokens)}


def cached(path: str | Path, mark: str, make) -> dict:
    """What `make()` returned when it was last called for the same `mark`; kept in the .npz file `path`."""
    path = Path(path)
    if path.exists():
        with np.load(path) as stored:
            if str(stored["fingerprint"]) == mark:
                return {k: stored[k] for k in stored.files if k != "fingerprint"}
        logging.info("%s is of other pictures or another autoencoder; it is made anew.", path)
    arrays = make()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")  # renamed when whole
    try:
        np.savez(temporary, fingerprint=np.asarray(mark), **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return arrays


class FromMemory:
    """Batches without end out of arrays [N, ...] in memory, each epoch in another order; position by (seed, batch).

    >>> batches = iter(FromMemory({"x": np.arange(4)}, batch_size=3, seed=0))
    >>> seen = np.concatenate([next(batches)["x"] for _ in range(4)])
    >>> [sorted(map(int, epoch)) for epoch in np.split(seen, 3)]
    [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], batch_size: int, seed: int) -> None:
        self._arrays, self._batch_size, self._seed = dict(arrays), batch_size, seed
        self._size = len(next(iter(self._arrays.values())))
        self._next = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))  # (epoch, its permutation)

    def __iter__(self) -> "FromMemory":
        return FromMemory(self._arrays, self._batch_size, self._seed)

    def __next__(self) -> dict[str, np.ndarray]:
        positions = self._next * self._batch_size + np.arange(self._batch_size)
        chosen = np.empty(self._batch_size, int)
        for epoch in np.unique(positions // self._size):
            if self._order[0] != epoch:
                self._order = int(epoch), np.random.default_rng([self._seed, int(epoch)]).permutation(self._size)
            here = positions // self._size == epoch
            chosen[here] = self._order[1][positions[here] % self._size]
        self._next += 1
        return {k: v[chosen] for k, v in self._arrays.items()}

    def get_state(self) -> dict[str, int]:
        return {"next": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._next = int(state["next"])
