"""From a source to batches, through grain: reproducible by seed, resumable, divided among hosts.

The pipeline is order -> this host's rows of each batch -> decode -> threads or processes -> batch. An order says which
example is at a position of the global stream, which all hosts read together. There are three:

  - every example by itself (folders, tar shards, Arrow, ArrayRecord): `Shuffled`;
  - blocks that can only be read as a whole (Parquet): each batch has rows from every host shard, one for each host that
    the run began with, see `HostShards` and `BlockOrder`;
  - buckets of sizes: each batch comes from one of them, see `buckets.BucketOrder`.

Randomness depends on the seed and the position alone, and host h of H reads rows h b … (h + 1) b - 1 of each batch of
H b positions. So batches do not depend on the number of hosts, threads or workers, nor on restarts, and the state of an
iterator is the number of examples that all hosts together have read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags, logging

from jaxdiff.config import ConfigError

WINDOW = 4  # blocks whose examples are mixed
FORMER_KEY = "lanes"  # the name of "host_shards" in states of older checkpoints
ENDLESS = 2**62  # positions; `len` allows no more than twice as many
MAX_REPLACEMENTS = 1000  # examples tried in place of a bad one
# (an order's entry, generator) -> an example as arrays and text, or {"skipped": name, "reason": sentence}
Decoder = Callable[[Any, np.random.Generator], dict[str, Any]]


class Order(Protocol):
    """What all hosts together read, position after position; an entry is what a `Decoder` takes."""

    size: int  # entries in the first epoch

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Any: ...


class Shuffled:
    """Numbers of examples, each by itself, in another order each epoch."""

    def __init__(self, size: int, *, seed: int, shuffle: bool, epochs: int | None) -> None:
        numbers = grain.MapDataset.range(size)  # no permutation is held: grain computes one index at a time
        self._numbers = (numbers.shuffle(seed=seed) if shuffle else numbers).repeat(epochs)
        self.size = size

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> int:
        return int(self._numbers[position])


class BlockOrder:
    """Numbers of examples: whole blocks in random order, and the examples within every `WINDOW` of them mixed.

    Args:
      counts: int [N], examples in each block.
      host_shard, host_shards: this order has every `host_shards`-th block, the same ones each epoch, so that a host
        that reads one shard reads no blocks of the others. Shards with fewer examples begin the next epoch earlier.

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
        every = np.random.default_rng(seed).permutation(len(counts)) if shuffle else np.arange(len(counts))
        mine = every[host_shard::host_shards]
        self._starts, self._counts = (np.cumsum(counts) - counts)[mine], np.asarray(counts)[mine]
        self.size, self._epochs = int(self._counts.sum()), epochs
        self._seed, self._shuffle = seed, shuffle
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self._window: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    def __len__(self) -> int:
        return self.size * self._epochs if self._epochs else ENDLESS

    def __getitem__(self, position: int) -> int:
        epoch, at = divmod(position, self.size)
        known = self._epoch  # one look: another thread may replace it
        if known[0] != epoch:
            blocks = np.arange(len(self._counts))
            if self._shuffle:
                blocks = np.random.default_rng([self._seed, epoch]).permutation(blocks)
            windows = np.add.reduceat(self._counts[blocks], np.arange(0, len(blocks), WINDOW))
            known = self._epoch = (epoch, blocks, np.cumsum(windows))
        _, blocks, ends = known
        number = int(np.searchsorted(ends, at, "right"))
        window = self._window
        if window[0] != (epoch, number):
            chosen = blocks[number * WINDOW : (number + 1) * WINDOW]
            examples = np.concatenate([self._starts[b] + np.arange(self._counts[b]) for b in chosen])
            if self._shuffle:
                examples = np.random.default_rng([self._seed, epoch, number]).permutation(examples)
            window = self._window = ((epoch, number), examples)
        return int(window[1][at - (int(ends[number - 1]) if number else 0)])


class HostShards:
    """Orders side by side: each has an equal share of the rows of every batch, the first order the first rows.

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
        shard, within = divmod(row, self._rows)
        return self._shards[shard][batch * self._rows + within]


class Skipped:
    """The images that could not be read so far.

    Attributes:
      count: how many times an image was left out.
      reasons: path -> what is wrong with it.
    """

    def __init__(self, path: str, limit: int):
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._path, self._limit, self._in_a_row = path, limit, 0

    def keep(self, element: dict[str, Any]) -> bool:
        """Whether the element holds an example, its own or a replacement. Bad ones are counted, and named once.

        Raises:
          ConfigError: `limit` elements in a row hold none.
        """
        path, reason = element.pop("skipped", None), element.pop("reason", None)
        self._in_a_row = 0 if element else self._in_a_row + 1
        if path is not None:
            self.count += 1
            if path not in self.reasons:
                self.reasons[path] = reason
                logging.warning("The image %s is skipped: %s", path, reason)
        if self._in_a_row >= self._limit:
            raise ConfigError(f"No image of {self._path} can be read; the last one, {path}: {reason}.")
        return bool(element)


@dataclasses.dataclass(frozen=True)
class GlobalStream:
    """The examples that all hosts read together, by position."""

    order: Order
    decode: Decoder
    seed: int
    replace: bool  # whether the next good example replaces a bad one

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The example at a position; of a bad one {"skipped", "reason"}, together with its replacement if any."""
        entry = self.order[position]
        found = self._decoded(entry, position)
        if "skipped" in found and self.replace:
            size = entry[1] if isinstance(entry, tuple) else None
            for following in range(position + 1, position + 1 + min(self.order.size, MAX_REPLACEMENTS)):
                entry = self.order[following % len(self.order)]
                if isinstance(entry, tuple) and entry[1] != size:
                    continue  # of another bucket
                if "skipped" not in (other := self._decoded(entry, position)):
                    return other | found
        return found

    def _decoded(self, entry: Any, position: int) -> dict[str, Any]:
        return self.decode(entry, np.random.default_rng([self.seed, position]))


@dataclasses.dataclass(frozen=True)
class HostSlice:
    """Rows `first` … `first + rows - 1` of each batch of a stream, from a position on."""

    stream: GlobalStream
    start: int
    batch: int
    first: int
    rows: int

    def __len__(self) -> int:
        whole, rest = divmod(max(len(self.stream.order) - self.start, 0), self.batch)
        return whole * self.rows + min(max(rest - self.first, 0), self.rows)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        batch, row = divmod(int(index), self.rows)
        return self.stream[self.start + batch * self.batch + self.first + row]

    def __repr__(self) -> str:  # in grain's own messages
        return type(self.stream.order).__name__


@dataclasses.dataclass(frozen=True)
class CaptionedData:
    """Batches of captioned images; each `iter` starts anew.

    An iterator has `get_state()`, small JSON that is the same on every host, and `set_state(state)`, after which the
    batches that followed come again, bit for bit. A state fits data opened with the same arguments; `threads`,
    `workers` and the number of hosts may differ, as long as the batch of all hosts together stays the same.
    `resize(workers=…, threads=…)` changes threads and workers without changing any batch. Worker processes end with
    the iterator, or its `close()`.
    """

    order: Callable[[int], Order]  # of so many host shards
    decode: Decoder
    seed: int  # of what is drawn in decoding
    host_shards: int  # of a new run
    replace: bool  # see `GlobalStream`; otherwise bad examples are left out
    size: int  # images in the whole source
    skipped: Skipped  # by all iterators together
    batch_size: int  # of this host
    host_index: int
    host_count: int
    drop_remainder: bool
    workers: int
    threads: int

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def stream(self, host_shards: int) -> GlobalStream:
        return GlobalStream(self.order(host_shards), self.decode, self.seed, self.replace)


class BatchIterator:
    """See `CaptionedData`."""

    def __init__(self, data: CaptionedData) -> None:
        self._data, self._host_shards, self._start, self._read = data, data.host_shards, 0, 0
        self._workers, self._threads = data.workers, data.threads
        self._examples: Any = None

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch: {"image": uint8 [b, H, W, 3], "text": list of b strings}, or what else is decoded."""
        data, rows = self._data, self._data.batch_size
        if self._examples is None:
            self._start, self._read = self._consumed(), 0
            stream, batch = data.stream(self._host_shards), rows * data.host_count
            mine = grain.MapDataset.source(HostSlice(stream, self._start, batch, data.host_index * rows, rows))
            self._examples = iter(_read_ahead(mine, rows, self._workers, self._threads))
        kept: list[dict[str, Any]] = []
        while len(kept) < rows and (element := next(self._examples, None)) is not None:
            self._read += 1
            if data.skipped.keep(element):
                kept.append(element)
        if not kept or (data.drop_remainder and len(kept) < rows):
            raise StopIteration
        return collate(kept)

    def _consumed(self) -> int:
        return self._start + self._read * self._data.host_count

    def get_state(self) -> dict[str, int]:
        """{"examples": how many all hosts together have read, "host_shards"}."""
        return {"examples": self._consumed(), "host_shards": self._host_shards}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on at a state of `get_state`. Raises ConfigError where it is not one."""
        known = state if isinstance(state, Mapping) else {}
        examples, shards = known.get("examples"), known.get("host_shards", known.get(FORMER_KEY))
        if not isinstance(examples, int) or not isinstance(shards, int):
            raise ConfigError("The position in the data was saved by another version of the input: begin a new run.")
        self.close()
        self._start, self._read, self._host_shards = examples, 0, shards

    def resize(self, *, workers: int | None = None, threads: int | None = None) -> None:
        """Go on with another number of worker processes or threads; what was read ahead is read again."""
        self.close()
        self._workers = self._workers if workers is None else workers
        self._threads = self._threads if threads is None else threads

    def close(self) -> None:
        """End threads and worker processes; the next batch starts new ones."""
        if self._examples is not None:
            self._examples.close()
        self._examples = None


def batches(
    name: str,
    size: int,
    decode: Decoder,
    batch_size: int,
    *,
    seed: int,
    order: Callable[[int, int], Order] | None = None,
    host_shards: int = 1,
    replace: bool = False,
    shuffle: bool = True,
    epochs: int | None = None,
    drop_remainder: bool = True,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 8,
) -> CaptionedData:
    """Batches of what `decode` makes of entries of an order.

    Args:
      name, size: of the source.
      decode: sees the numbers 0 … size - 1, or the entries of `order`.
      order: called with a seed and a number of host shards; None reads every example by itself.
      host_shards: how many a new run has.
      replace: whether the next good example replaces a bad one. Without `epochs` it always does, so that all hosts stay
        at one position.

    Others as for `jaxdiff.data.captioned.captioned_data`.

    Raises:
      ConfigError: the batch is larger than what this host reads in all epochs.
    """
    order_seed, draw_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))

    @functools.cache
    def ordered(host_shards: int) -> Order:
        if order is None:
            return Shuffled(size, seed=order_seed, shuffle=shuffle, epochs=epochs)
        return order(order_seed, host_shards)

    first, replace = ordered(host_shards), replace or epochs is None
    readable = len(first) // host_count
    if drop_remainder and readable < batch_size:
        raise ConfigError(
            f"batch_size {batch_size} is more than the {readable} images that this host reads from {name}: lower it."
        )
    skipped = Skipped(name, 1 if replace else first.size)
    return CaptionedData(
        ordered, decode, draw_seed, host_shards, replace, size, skipped, batch_size, host_index, host_count,
        drop_remainder, workers, threads,
    )  # fmt: skip


def _read_ahead(examples: grain.MapDataset, batch_size: int, workers: int, threads: int) -> grain.IterDataset:
    # Room for two batches in all, and one example more for every thread, so that none waits.
    buffer = 2 * batch_size // max(workers, 1) + threads
    dataset = examples.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
    if workers:
        if not flags.FLAGS.is_parsed():  # outside of absl's `app.run`, where grain reads its flags all the same
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer))
    return dataset


def collate(elements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Examples as a batch: arrays are stacked, text makes a list."""
    names = elements[0].keys()
    columns = {n: [e[n] for e in elements] for n in names}
    return {n: c if isinstance(c[0], str) else np.stack(c) for n, c in columns.items()}


def read_range(data: CaptionedData, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Examples at positions start … stop - 1 of the global stream, bad ones included; two batches are read ahead."""
    whole = grain.MapDataset.source(HostSlice(data.stream(data.host_shards), 0, 1, 0, 1))
    return iter(_read_ahead(whole[start:stop], data.batch_size, data.workers, data.threads))
