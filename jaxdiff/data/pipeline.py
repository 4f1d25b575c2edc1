"""From a source to batches, through grain: reproducible by seed, resumable, divided among hosts.

The pipeline is order -> this host's rows of each batch -> decode -> threads or processes -> batch. An order says which
example is at a position of the global stream, which all hosts read together, see `jaxdiff.data.orders`.

Randomness depends on the seed and the position alone, and host h of H reads rows h b … (h + 1) b - 1 of each batch of
H b positions. So batches do not depend on the number of hosts, threads or workers, nor on restarts, and the state of an
iterator is the number of examples that all hosts together have read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from jaxdiff.config import ConfigError
from jaxdiff.data.orders import Order, Shuffled

FORMER_KEY = "lanes"  # the name of "host_shards" in states of older checkpoints
MAX_REPLACEMENTS = 1000  # examples tried in place of a bad one
# (an order's entry, generator) -> an example as arrays and text, or {"skipped": name, "reason": sentence}
Decoder = Callable[[Any, np.random.Generator], dict[str, Any]]


class Skipped:
    """Counts the images that could not be read.

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

    order: Callable[[int], Order]  # number of host shards -> order
    decode: Decoder
    seed: int  # of random choices in decoding
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
        """Resume from a state of `get_state`. Raises ConfigError if `state` is not one."""
        known = state if isinstance(state, Mapping) else {}
        examples, shards = known.get("examples"), known.get("host_shards", known.get(FORMER_KEY))
        if not isinstance(examples, int) or not isinstance(shards, int):
            raise ConfigError("The position in the data was saved by another version of the input: begin a new run.")
        self.close()
        self._start, self._read, self._host_shards = examples, 0, shards

    def resize(self, *, workers: int | None = None, threads: int | None = None) -> None:
        """Continue with another number of worker processes or threads. Batches read ahead are read again."""
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
        replace: whether the next good example replaces a bad one. Without `epochs` it always does, so that all hosts
            stay at one position.

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
