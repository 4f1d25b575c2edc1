"""Aspect-ratio buckets: sizes of nearly equal area, and batches that each have one of them.

As in NovelAI's training of Stable Diffusion (blog.novelai.net, October 2022), except that every example of a bucket is
read once an epoch, but for a remainder that does not fill a batch, which differs from epoch to epoch.
"""

from typing import NamedTuple

import grain
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.orders import ENDLESS


class Buckets(NamedTuple):
    """Sizes, and which of them each example is cut to."""

    sizes: tuple[tuple[int, int], ...]  # (height, width), in pixels
    numbers: np.ndarray  # int [N], the number of each example's size; -1 leaves the example out


def bucket_sizes(image_size: int, multiple: int = 64, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """(height, width) in multiples of `multiple` pixels, none of more pixels than the square of `image_size`.

    >>> bucket_sizes(512, 64, 2.0)
    ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))

    Raises:
        ConfigError: there is no such size.
    """
    if multiple < 1 or image_size < multiple or max_aspect < 1:
        raise ConfigError(
            f"There are no buckets of {image_size} pixels in multiples of {multiple} with aspects up to {max_aspect}: "
            "image_size must be at least the multiple, and the aspect at least 1."
        )
    area, found = image_size**2, set()
    for side in range(multiple, area // multiple + 1, multiple):
        other = area // side // multiple * multiple
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    # Of two that differ in their longer side alone, the larger.
    longest = {min(size): max(max(s) for s in found if min(s) == min(size)) for size in found}
    return tuple(sorted(size for size in found if max(size) == longest[min(size)]))


def assign(sizes: tuple[tuple[int, int], ...], widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """For each image the number of the size with the nearest aspect ratio, by its logarithm; int16 [N].

    -1 for an unreadable image, which has width or height 0.

    Args:
        sizes: (height, width) of each bucket.
        widths, heights: int [N], in pixels.
    """
    aspects = np.log([w / h for h, w in sizes])
    order = np.argsort(aspects)
    borders = (aspects[order][1:] + aspects[order][:-1]) / 2
    ratios = np.log(np.maximum(widths, 1) / np.maximum(heights, 1))
    return np.where((widths > 0) & (heights > 0), order[np.searchsorted(borders, ratios)], -1).astype(np.int16)


class BucketOrder:
    """Entries (number of an example, (height, width)), of one size for `batch` positions in a row.

    The order differs from epoch to epoch. No permutation is kept in memory: grain's shuffle computes one index at a
    time.

    Args:
        batch: examples in a batch of all hosts together.

    Raises:
        ConfigError: no bucket fills a batch.
    """

    def __init__(
        self, buckets: Buckets, batch: int, *, seed: int, shuffle: bool = True, epochs: int | None = None
    ) -> None:
        self._batch, self._epochs = batch, epochs
        numbers = buckets.numbers
        by_bucket = np.argsort(numbers, kind="stable")
        counts = np.bincount(numbers[numbers >= 0], minlength=len(buckets.sizes))
        ends = np.cumsum(counts) + np.count_nonzero(numbers < 0)
        self._sizes = buckets.sizes
        self._members = [by_bucket[e - c : e] for e, c in zip(ends, counts, strict=True)]
        self._last_batch = np.cumsum(counts // batch)  # of each bucket, in an epoch
        self._steps = int(self._last_batch[-1])
        if not self._steps:
            raise ConfigError(f"No bucket holds the {batch} images of one batch: lower batch_size.")
        seeds = np.random.SeedSequence(seed).generate_state(len(counts) + 1)

        def permuted(count: int, seed: int) -> grain.MapDataset:
            numbers = grain.MapDataset.range(max(count, 1))
            return numbers.shuffle(seed=int(seed)) if shuffle else numbers

        self._batches = permuted(self._steps, seeds[-1])
        self._within = [permuted(int(c), s) for c, s in zip(counts, seeds[:-1], strict=True)]
        self.size = self._steps * batch

    def __len__(self) -> int:
        return self.size * self._epochs if self._epochs else ENDLESS

    def __getitem__(self, position: int) -> tuple[int, tuple[int, int]]:
        step, row = divmod(position, self._batch)
        epoch = step // self._steps
        batch = self._batches[step]
        bucket = int(np.searchsorted(self._last_batch, batch, "right"))
        first = int(self._last_batch[bucket - 1]) if bucket else 0
        members = self._members[bucket]
        place = (batch - first) * self._batch + row
        # grain gives the second pass over a shuffled range another order.
        return int(members[self._within[bucket][epoch * len(members) + place]]), self._sizes[bucket]
