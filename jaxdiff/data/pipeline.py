"""From a source to batches, through grain: reproducible by seed, resumable, shared out between hosts.

The pipeline is order -> decode -> this host's share -> threads or processes -> drop bad -> batch. An order says which
example stands at a position of the endless stream; there are three:

  - every example by itself (folders, tar shards, Arrow, ArrayRecord): host h of H reads positions h, h + H, ... of one
    stream, which is the same whatever H is;
  - blocks that are only read as a whole (Parquet): each host has blocks of its own, see `BlockOrder`;
  - buckets of sizes: each batch comes from one of them, see `buckets.BucketOrder`.

Randomness hangs on the seed and the position alone. So neither the number of threads or workers nor a restart changes
what a position holds, and the state of an iterator is one number.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags, logging

from jaxdiff.config import ConfigError

WINDOW = 4  # blocks whose examples are mixed
# (an order's entry, generator) -> an example as arrays and text, or {"skipped": name, "reason": sentence}
Decode = Callable[[Any, np.random.Generator], dict[str, Any]]


class Order(Protocol):
    """What this host reads, position after position; an entry is what `Decode` takes."""

    size: int  # entries in the first epoch

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Any: ...


class BlockOrder:
    """Numbers of examples: whole blocks in random order, and the examples within every `WINDOW` of them mixed.

    Each host has blocks of its own, the same every epoch, so that it reads no others; hosts whose blocks are smaller
    begin the next epoch earlier.

    >>> order = BlockOrder(np.asarray([2, 3, 1]), seed=0, shuffle=True, epochs=None)
    >>> [sorted(order[6 * epoch + i] for i in range(6)) for epoch in (0, 7)]
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    """

    def __init__(
        self, counts: np.ndarray, *, seed: int, shuffle: bool, epochs: int | None, host_index: int = 0,
        host_count: int = 1,
    ) -> None:  # fmt: skip
        if len(counts) < host_count:
            raise ConfigError(f"{len(counts)} row groups cannot be shared by {host_count} hosts: write smaller ones.")
        shared = np.random.default_rng(seed).permutation(len(counts)) if shuffle else np.arange(len(counts))
        mine = shared[host_index::host_count]
        self._starts, self._counts = (np.cumsum(counts) - counts)[mine], np.asarray(counts)[mine]
        self.size, self._epochs = int(self._counts.sum()), epochs
        self._seed, self._shuffle = seed, shuffle
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self._window: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0))

    def __len__(self) -> int:
        return self.size * self._epochs if self._epochs else 2**62

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


class Skipped:
    """The pictures that could not be read so far.

    Attributes:
      count: how many times a picture was left out.
      reasons: path -> what was wrong with it.
    """

    def __init__(self, path: str, limit: int):
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._path, self._limit, self._in_a_row = path, limit, 0

    def keep(self, element: dict[str, Any]) -> bool:
        """Whether the element is a picture. One that is not is counted, and named the first time.

        Raises:
          ConfigError: there were only bad ones for the length of an epoch.
        """
        if "skipped" not in element:
            self._in_a_row = 0
            return True
        self.count += 1
        self._in_a_row += 1
        path, reason = element["skipped"], element["reason"]
        if path not in self.reasons:
            self.reasons[path] = reason
            logging.warning("The picture %s is skipped: %s", path, reason)
        if self._in_a_row >= self._limit:
            raise ConfigError(f"No picture of {self._path} can be read; the last one, {path}: {reason}.")
        return False


@dataclasses.dataclass(frozen=True)
class CaptionedData:
    """Batches of captioned pictures; each `iter` starts anew.

    An iterator has `get_state()`, small and JSON, and `set_state(state)`, after which the batches that followed come
    again, bit for bit. A state fits data opened with the same arguments; `threads` and `workers` may differ. They may
    also be changed on the way: `resize(workers=…, threads=…)` changes no batch. Worker processes end with the
    iterator, or its `close()`.
    """

    stream: grain.MapDataset  # of single examples, this host's share
    size: int  # pictures in the whole source
    skipped: Skipped  # by all iterators together
    batch_size: int
    drop_remainder: bool
    fixed: bool  # whether batches are fixed parts of the stream, in which bad examples are replaced
    workers: int
    threads: int

    def __iter__(self) -> "Batches":
        return Batches(self)


class Batches:
    """See `CaptionedData`."""

    def __init__(self, data: CaptionedData) -> None:
        self._data, self._position = data, 0
        self._workers, self._threads = data.workers, data.threads
        self._examples: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch: {"image": uint8 [b, H, W, 3], "text": list of b strings}, or what else is decoded."""
        data = self._data
        if self._examples is None:
            self._examples = iter(
                _read_ahead(data.stream[self._position :], data.batch_size, self._workers, self._threads)
            )
        kept: list[dict[str, Any]] = []
        for _ in range(data.batch_size) if data.fixed else iter(int, 1):
            if len(kept) == data.batch_size or (element := next(self._examples, None)) is None:
                break
            self._position += 1
            if data.skipped.keep(element):
                kept.append(element)
        if data.fixed and kept:
            kept = [kept[i % len(kept)] for i in range(data.batch_size)]
        elif data.fixed and element is not None:
            raise ConfigError(f"No picture of a whole batch can be read; the last one: {element['reason']}.")
        if not kept or (data.drop_remainder and len(kept) < data.batch_size):
            raise StopIteration
        return collate(kept)

    def get_state(self) -> dict[str, int]:
        return {"position": self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        if not isinstance(state, Mapping) or not isinstance(state.get("position"), int):
            raise ConfigError("The position in the data was saved by another version of the input: begin a new run.")
        self.close()
        self._position = state["position"]

    def resize(self, *, workers: int | None = None, threads: int | None = None) -> None:
        """Read on with another number of worker processes or threads; what was read ahead is read again."""
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
    decode: Decode,
    batch_size: int,
    *,
    seed: int,
    order: Callable[[int], Order] | None = None,
    fixed: bool = False,
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
      order: called with a seed, the order of this host's share; None reads every example by itself.
      fixed: see `CaptionedData`.

    Others as for `captioned_folder`.

    Raises:
      ConfigError: the batch is larger than this host's share.
    """
    order_seed, draw_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    if order is None:
        stream = grain.MapDataset.range(size)
        if shuffle:
            stream = stream.shuffle(seed=order_seed)
        stream = stream.repeat(epochs).random_map(decode, seed=draw_seed)[host_index::host_count]
        epoch = min(size, len(stream))
    else:
        of_host = order(order_seed)
        if host_count > 1:  # no two hosts may draw alike at one position
            draw_seed = int(np.random.SeedSequence([draw_seed, host_index]).generate_state(1)[0])
        stream = grain.MapDataset.source(_Entries(of_host)).random_map(decode, seed=draw_seed)
        epoch = of_host.size
    if drop_remainder and len(stream) < batch_size:
        raise ConfigError(
            f"batch_size {batch_size} is more than the {len(stream)} pictures this host reads from {name}: lower it."
        )
    return CaptionedData(stream, size, Skipped(name, epoch), batch_size, drop_remainder, fixed, workers, threads)


@dataclasses.dataclass(frozen=True)
class _Entries:
    """An order as grain wants a source: with a name for its own messages."""

    order: Order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> Any:
        return self.order[int(position)]

    def __repr__(self) -> str:
        return type(self.order).__name__


def _read_ahead(stream: grain.MapDataset, batch_size: int, workers: int, threads: int) -> grain.IterDataset:
    # Room for two batches in all; a picture more for every thread, so that none waits.
    buffer = 2 * batch_size // max(workers, 1) + threads
    dataset = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
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


def examples(data: CaptionedData, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Examples at positions start … stop - 1 of a stream, bad ones among them."""
    return iter(_read_ahead(data.stream[start:stop], stop - start, data.workers, data.threads))
