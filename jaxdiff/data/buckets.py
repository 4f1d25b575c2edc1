"""Aspect-ratio buckets: sizes of nearly equal area, and batches of one size each.

As in NovelAI's training of Stable Diffusion (blog.novelai.net, October 2022), but every example of a bucket is read
once per epoch, except for a remainder that does not fill a batch, which differs between epochs.
"""

from typing import NamedTuple

import grain
import numpy as np

from jaxdiff.config import ConfigError
from jaxdiff.data.orders import ENDLESS


class Buckets(NamedTuple):
    """Sizes, and the size that each example is cropped to."""

    sizes: tuple[tuple[int, int], ...]  # (height, width), in pixels
    numbers: np.ndarray  # int [N], index of each example's size; -1 leaves the example out


def bucket_sizes(image_size: int, multiple: int = 64, max_aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) in multiples of `multiple` pixels, with areas of at most `image_size` squared.

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
    area, sizes = image_size**2, set()
    for side in range(multiple, area // multiple + 1, multiple):
        other_side = area // side // multiple * multiple
        if other_side and max(side, other_side) <= max_aspect * min(side, other_side):
            sizes |= {(side, other_side), (other_side, side)}
    # Of sizes with the same shorter side, the largest.
    longest = {min(size): max(max(s) for s in sizes if min(s) == min(size)) for size in sizes}
    return tuple(sorted(size for size in sizes if max(size) == longest[min(size)]))


def assign(sizes: tuple[tuple[int, int], ...], widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """For each image the index of the size with the nearest aspect ratio, by its logarithm; int16 [N].

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
    """Entries (index of an example, (height, width)), of one size for `batch` consecutive positions.

    The order differs between epochs. No permutation is held in memory: grain's shuffle computes one index at a time.

    Args:
        batch: examples in a global batch.

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
        self._members = [by_bucket[end - count : end] for end, count in zip(ends, counts, strict=True)]
        self._last_batch = np.cumsum(counts // batch)  # of each bucket, in an epoch
        self._steps = int(self._last_batch[-1])
        if not self._steps:
            raise ConfigError(f"No bucket holds the {batch} images of one batch: lower batch_size.")
        seeds = np.random.SeedSequence(seed).generate_state(len(counts) + 1)

        def permuted(count: int, seed: int) -> grain.MapDataset:
            indices = grain.MapDataset.range(max(count, 1))
            return indices.shuffle(seed=int(seed)) if shuffle else indices

        self._batches = permuted(self._steps, seeds[-1])
        self._within = [permuted(int(count), s) for count, s in zip(counts, seeds[:-1], strict=True)]
        self.size = self._steps * batch

    def __len__(self) -> int:
        return self.size * self._epochs if self._epochs else ENDLESS

    def __getitem__(self, position: int) -> tuple[int, tuple[int, int]]:
        step, row = divmod(position, self._batch)
        epoch = step // self._steps
        batch = self._batches[step]
        bucket = int(np.searchsorted(self._last_batch, batch, "right"))
        first_batch = int(self._last_batch[bucket - 1]) if bucket else 0
        members = self._members[bucket]
        index = (batch - first_batch) * self._batch + row
        # grain gives the second pass over a shuffled range another order.
        return int(members[self._within[bucket][epoch * len(members) + index]]), self._sizes[bucket]
