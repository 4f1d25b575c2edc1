"""From a source to batches with grain: reproducible by seed, resumable, divided among hosts.

The pipeline is order -> this host's rows of each batch -> decode -> threads or processes -> batch. An order maps the
positions of the global stream, which all hosts read together, to examples, see `jaxdiff.data.orders`.

Randomness depends only on the seed and the position, and host h of H reads rows h b … (h + 1) b - 1 of each batch of
H b positions. Batches therefore do not depend on the number of hosts, threads or workers, nor on restarts, and the
state of an iterator is the number of examples that all hosts together have read.
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

FORMER_KEY = "lanes"  # the former name of "host_shards", in states of older checkpoints
MAX_REPLACEMENTS = 1000  # examples tried in place of a bad one
# (an order's entry, generator) -> an example as arrays and text, or {"skipped": name, "reason": sentence}
Decoder = Callable[[Any, np.random.Generator], dict[str, Any]]


class Skipped:
    """Counts the images that could not be read.

    Attributes:
        count: number of images left out.
        reasons: path -> what is wrong with it.
    """

    def __init__(self, path: str, limit: int):
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._path, self._limit, self._in_a_row = path, limit, 0

    def keep(self, element: dict[str, Any]) -> bool:
        """Whether the element holds an example, its own or a replacement. Bad images are counted, and logged once.

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
        """The example at a position; for a bad one {"skipped", "reason"}, together with its replacement if any."""
        entry = self.order[position]
        example = self._decode(entry, position)
        if "skipped" in example and self.replace:
            size = entry[1] if isinstance(entry, tuple) else None
            for next_position in range(position + 1, position + 1 + min(self.order.size, MAX_REPLACEMENTS)):
                entry = self.order[next_position % len(self.order)]
                if isinstance(entry, tuple) and entry[1] != size:
                    continue  # of another bucket
                if "skipped" not in (replacement := self._decode(entry, position)):
                    return replacement | example
        return example

    def _decode(self, entry: Any, position: int) -> dict[str, Any]:
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
        full_batches, remainder = divmod(max(len(self.stream.order) - self.start, 0), self.batch)
        return full_batches * self.rows + min(max(remainder - self.first, 0), self.rows)

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
    size: int  # images in the source
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
        data, batch_size = self._data, self._data.batch_size
        if self._examples is None:
            self._start, self._read = self._consumed(), 0
            stream, global_batch = data.stream(self._host_shards), batch_size * data.host_count
            rows = HostSlice(stream, self._start, global_batch, data.host_index * batch_size, batch_size)
            examples = grain.MapDataset.source(rows)
            self._examples = iter(_read_ahead(examples, batch_size, self._workers, self._threads))
        elements: list[dict[str, Any]] = []
        while len(elements) < batch_size and (element := next(self._examples, None)) is not None:
            self._read += 1
            if data.skipped.keep(element):
                elements.append(element)
        if not elements or (data.drop_remainder and len(elements) < batch_size):
            raise StopIteration
        return collate(elements)

    def _consumed(self) -> int:
        return self._start + self._read * self._data.host_count

    def get_state(self) -> dict[str, int]:
        """{"examples": how many all hosts together have read, "host_shards"}."""
        return {"examples": self._consumed(), "host_shards": self._host_shards}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Resume from a state of `get_state`. Raises ConfigError if `state` is not one."""
        fields = state if isinstance(state, Mapping) else {}
        examples, host_shards = fields.get("examples"), fields.get("host_shards", fields.get(FORMER_KEY))
        if not isinstance(examples, int) or not isinstance(host_shards, int):
            raise ConfigError("The position in the data was saved by another version of the input: begin a new run.")
        self.close()
        self._start, self._read, self._host_shards = examples, 0, host_shards

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
    """Batches of the examples that `decode` makes of an order's entries.

    Args:
        name, size: of the source.
        decode: called with the entries of `order`, by default the indices 0 … size - 1.
        order: called with a seed and a number of host shards; None reads examples one by one.
        host_shards: their number in a new run.
        replace: whether the next good example replaces a bad one. Without `epochs` it always does, so that all hosts
            stay at the same position.

    Others as for `jaxdiff.data.captioned.captioned_data`.

    Raises:
        ConfigError: the batch is larger than what this host reads in all epochs.
    """
    order_seed, decode_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))

    @functools.cache
    def order_for(host_shards: int) -> Order:
        if order is None:
            return Shuffled(size, seed=order_seed, shuffle=shuffle, epochs=epochs)
        return order(order_seed, host_shards)

    initial_order, replace = order_for(host_shards), replace or epochs is None
    readable = len(initial_order) // host_count
    if drop_remainder and readable < batch_size:
        raise ConfigError(
            f"batch_size {batch_size} is more than the {readable} images that this host reads from {name}: lower it."
        )
    skipped = Skipped(name, 1 if replace else initial_order.size)
    return CaptionedData(
        order_for, decode, decode_seed, host_shards, replace, size, skipped, batch_size, host_index, host_count,
        drop_remainder, workers, threads,
    )  # fmt: skip


def _read_ahead(examples: grain.MapDataset, batch_size: int, workers: int, threads: int) -> grain.IterDataset:
    # Room for two batches in total, and one more example for each thread, so that none waits.
    buffer = 2 * batch_size // max(workers, 1) + threads
    dataset = examples.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
    if workers:
        if not flags.FLAGS.is_parsed():  # outside of absl's `app.run`, grain reads its flags nevertheless
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer))
    return dataset


def collate(elements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Examples as a batch: arrays are stacked, text makes a list."""
    names = elements[0].keys()
    columns = {name: [element[name] for element in elements] for name in names}
    return {name: values if isinstance(values[0], str) else np.stack(values) for name, values in columns.items()}


def read_range(data: CaptionedData, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Examples at positions start … stop - 1 of the global stream, bad ones included; two batches are read ahead."""
    examples = grain.MapDataset.source(HostSlice(data.stream(data.host_shards), 0, 1, 0, 1))
    return iter(_read_ahead(examples[start:stop], data.batch_size, data.workers, data.threads))
