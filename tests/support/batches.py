"""Batches out of arrays in memory, for tests of what is not about reading."""

from collections.abc import Mapping

import numpy as np


class FromMemory:
    """Batches without end out of arrays [N, ...], each epoch in another order."""

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
