"""Orders map positions of the global stream, which all hosts read together, to examples.

- `Shuffled`: examples that can be read one by one (folders, tar shards, Arrow, ArrayRecord).
- `HostShards` of `BlockOrder`s: blocks that can only be read as a whole (Parquet). Each batch has rows from every host
  shard, of which there is one for each host that the run began with.
- `buckets.BucketOrder`: buckets of sizes; each batch comes from one of them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

from jaxdiff.config import ConfigError

WINDOW = 4  # blocks whose examples are mixed
ENDLESS = 2**62  # length of an endless order; `len` cannot return more than twice that


class Order(Protocol):
    """The entries that all hosts read together, by position; a `pipeline.Decoder` decodes them."""

    size: int  # entries in the first epoch

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Any: ...


class Shuffled:
    """Indices of examples, in another order each epoch."""

    def __init__(self, size: int, *, seed: int, shuffle: bool, epochs: int | None) -> None:
        indices = grain.MapDataset.range(size)  # no permutation is held: grain computes one index at a time
        self._indices = (indices.shuffle(seed=seed) if shuffle else indices).repeat(epochs)
        self.size = size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> int:
        return int(self._indices[position])


class BlockOrder:
    """Indices of examples: blocks in random order, and the examples of each `WINDOW` consecutive blocks mixed.

    Args:
        counts: int [N], examples in each block.
        host_shard, host_shards: this order has every `host_shards`-th block, the same ones each epoch, so that a host
            only reads blocks of its own shards. Shards with fewer examples begin the next epoch earlier.

    >>> order = BlockOrder(np.asarray([2, 3, 1]), seed=0, shuffle=True, epochs=None)
    >>> [sorted(order[6 * epoch + i] for i in range(6)) for epoch in (0, 7)]
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]

    Raises:
        ConfigError: there are fewer blocks than host shards.
    """

    def __init__(
        self,
        counts: np.ndarray,
        *,
        seed: int,
        shuffle: bool,
        epochs: int | None,
        host_shard: int = 0,
        host_shards: int = 1,
    ) -> None:
        if len(counts) < host_shards:
            raise ConfigError(f"{len(counts)} row groups are too few for {host_shards} hosts: write smaller ones.")
        block_order = np.random.default_rng(seed).permutation(len(counts)) if shuffle else np.arange(len(counts))
        own_blocks = block_order[host_shard::host_shards]
        self._starts, self._counts = (np.cumsum(counts) - counts)[own_blocks], np.asarray(counts)[own_blocks]
        self.size, self._epochs = int(self._counts.sum()), epochs
        self._seed, self._shuffle = seed, shuffle
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self._window: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    def __len__(self) -> int:
        return self.size * self._epochs if self._epochs else ENDLESS

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        epoch_state = self._epoch  # read once: another thread may replace it
        if epoch_state[0] != epoch:
            blocks = np.arange(len(self._counts))
            if self._shuffle:
                blocks = np.random.default_rng([self._seed, epoch]).permutation(blocks)
            windows = np.add.reduceat(self._counts[blocks], np.arange(0, len(blocks), WINDOW))
            epoch_state = self._epoch = (epoch, blocks, np.cumsum(windows))
        _, blocks, ends = epoch_state
        window_index = int(np.searchsorted(ends, offset, "right"))
        window = self._window
        if window[0] != (epoch, window_index):
            window_blocks = blocks[window_index * WINDOW : (window_index + 1) * WINDOW]
            examples = np.concatenate([self._starts[b] + np.arange(self._counts[b]) for b in window_blocks])
            if self._shuffle:
                examples = np.random.default_rng([self._seed, epoch, window_index]).permutation(examples)
            window = self._window = ((epoch, window_index), examples)
        return int(window[1][offset - (int(ends[window_index - 1]) if window_index else 0)])


class HostShards:
    """Orders side by side: each supplies an equal share of the rows of every batch, the first order the first rows.

    Raises:
        ConfigError: the batch is not divisible by the number of orders.
    """

    def __init__(self, shards: Sequence[Order], batch: int) -> None:
        self._shards, self._batch, self._rows = shards, batch, batch // len(shards)
        if batch % len(shards):
            raise ConfigError(
                f"The batch of {batch} must be divisible by {len(shards)}, the number of hosts that the run began with."
            )
        self.size = min(shard.size for shard in shards) * len(shards)

    def __len__(self) -> int:
        return min(min(map(len, self._shards)) * len(self._shards), ENDLESS)

    def __getitem__(self, position: int) -> Any:
        batch, row = divmod(position, self._batch)
        shard, shard_row = divmod(row, self._rows)
        return self._shards[shard][batch * self._rows + shard_row]
