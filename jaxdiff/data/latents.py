"""Precomputed latents and text as examples, as `jaxdiff.training.precompute` writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data import store
from jaxdiff.data.buckets import Buckets

# {"fingerprint", "model", "parts": [names], "sizes": [[h, w] of each part's latents], "made": {setting: value}}
INFO = "latents.json"


class LatentShards:
    """Examples {"latents": [h, w, C], "tokens": [L], …} in a folder of parts, each of one size.

    Attributes:
        buckets: sizes of latents and each example's size; None if all have the same.
        fingerprint: of the data, settings and models that the latents were computed from.
        model: fingerprint of the autoencoder and tokenizer alone.
        made: the settings that the latents were written with, by name.
        names: of the arrays of an example.

    Raises:
        ConfigError: the folder is missing, unfinished or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            info = json.loads((path / INFO).read_bytes())
            parts, part_sizes = [str(p) for p in info["parts"]], [(int(h), int(w)) for h, w in info["sizes"]]
            self.fingerprint, self.model = str(info["fingerprint"]), str(info["model"])
            self.made = dict(info.get("made", {}))
        except OSError as e:
            raise ConfigError(
                f"{path / INFO} cannot be read ({e.strerror}): write it with train.py --precompute."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path / INFO} is damaged: delete it and run train.py --precompute again.") from None
        if missing := [p for p in parts if "/" in p or not (path / p).is_dir()]:
            raise ConfigError(f"{path / missing[0]} is missing: run train.py --precompute again.")
        self._rows = store.Rows([str(path / p) for p in parts])
        sizes = tuple(sorted(set(part_sizes)))
        numbers = np.repeat([sizes.index(s) for s in part_sizes], self._rows.counts)
        self.buckets = Buckets(sizes, numbers) if len(sizes) > 1 else None
        if not len(self._rows):
            raise ConfigError(f"{path} holds no examples.")
        self.names = tuple(self._rows[0][1])

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, entry: int | tuple[int, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays of an entry of an order: an index, or (index, size)."""
        _, row = self._rows[entry[0] if isinstance(entry, tuple) else int(entry)]
        return {name: np.array(values) for name, values in row.items()}
