"""Buckets of sizes: which there are, and which batches come out of them."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.data.buckets import BucketOrder, Buckets, assign, bucket_sizes
from jaxdiff.data.captioned import captioned_data, open_source
from jaxdiff.data.filters import scan
from jaxdiff.data.tables import KEPT_GROUPS
from tests.support.image_datasets import numbers, write_folder, write_parquet, write_tars

SIDES = [(16, 16), (32, 16), (16, 32), (24, 12), (15, 15)]  # (width, height) of the images


@pytest.mark.parametrize(("size", "multiple", "aspect"), [(512, 64, 2.0), (1024, 64, 4.0), (16, 4, 2.0), (64, 64, 3.0)])
def test_sizes_are_multiples_of_nearly_equal_area(size, multiple, aspect):
    sizes = bucket_sizes(size, multiple, aspect)
    assert (size, size) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0
        # One more multiple of the longer side would be too much.
        assert h * w <= size**2 < h * w + min(h, w) * multiple
        assert max(h, w) <= aspect * min(h, w)


def test_sizes_that_do_not_exist():
    with pytest.raises(ConfigError, match="image_size must be at least the multiple"):
        bucket_sizes(32, 64)


def test_each_image_goes_to_the_nearest_aspect():
    sizes = ((8, 16), (12, 12), (16, 8))
    widths, heights = np.asarray([100, 200, 141, 142, 50, 1, 9000]), np.asarray([100, 100, 100, 100, 99, 900, 1])
    assert [sizes[i] for i in assign(sizes, widths, heights)] == [
        (12, 12), (8, 16), (12, 12), (8, 16), (16, 8), (16, 8), (8, 16)
    ]  # fmt: skip


def order(counts, batch_size, **kwargs):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(-1, len(counts) - 1), counts))
    sizes = tuple((8 * (i + 1), 8) for i in range(len(counts) - 1))
    return labels, BucketOrder(Buckets(sizes, labels), batch_size, seed=3, **kwargs)


@pytest.mark.parametrize("batch", [4, 8])
def test_an_epoch_is_every_example_once_but_for_the_remainders(batch):
    counts = [2, 17, 3, 40]  # the first are left out by -1
    labels, ordered = order(counts, batch)
    assert ordered.size == sum(c - c % batch for c in counts[1:])
    epochs = []
    for epoch in range(3):
        entries = [ordered[epoch * ordered.size + i] for i in range(ordered.size)]
        for start in range(0, ordered.size, batch):  # one size at a time
            assert len({shape for _, shape in entries[start : start + batch]}) == 1
        found = [i for i, _ in entries]
        assert len(set(found)) == len(found)
        assert all(shape == (8 * (labels[i] + 1), 8) for i, shape in entries)
        epochs.append(found)
    assert epochs[0] != epochs[1]
    # Other remainders each time: of 17, one of 4 or of 8 that is left out once is in another epoch.
    assert set(epochs[0]) != set(epochs[1]) | set(epochs[2])


def test_no_bucket_fills_a_batch():
    with pytest.raises(ConfigError, match="No bucket holds the 8 images of one batch"):
        order([0, 7, 7], 8)


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    source = open_source(write_tars(tmp_path_factory.mktemp("data") / "d", 31, sizes=SIDES, bad=(4,)))
    found = scan(source, sizes=True)
    sizes = bucket_sizes(16, 4, 2.0)
    return source, Buckets(sizes, assign(sizes, found["width"], found["height"]))


def test_batches_are_cut_to_their_bucket_and_compiled_once_each(bucketed):
    source, buckets = bucketed
    data = captioned_data(source, 3, 16, seed=0, buckets=buckets, epochs=4, threads=2)
    compiled = []

    @jax.jit
    def step(images):
        compiled.append(images.shape)
        return images.mean()

    shapes, seen = set(), []
    for batch in data:
        step(batch["image"])
        shapes.add(batch["image"].shape)
        found = numbers(batch)
        seen += found
        assert {buckets.sizes[buckets.numbers[n]] for n in found} == {batch["image"].shape[1:3]}
    assert sorted(compiled) == sorted(shapes)
    assert len(shapes) == 3  # of the shapes in SIDES: two squares, two of one aspect
    assert data.skipped.count  # the bad one is replaced by another of its batch: every batch is full
    assert 4 not in seen
    assert len(seen) == 4 * sum(c - c % 3 for c in np.bincount(buckets.numbers))


def test_buckets_resume_exactly(bucketed):
    source, buckets = bucketed

    def batches(threads):
        return iter(captioned_data(source, 3, 16, seed=0, buckets=buckets, flip=True, threads=threads))

    first, second = batches(1), batches(3)
    expected = list(itertools.islice(first, 4))
    state = json.loads(json.dumps(first.get_state()))
    expected = list(itertools.islice(first, 9))
    second.set_state(state)
    for batch in expected:
        again = next(second)
        assert again["text"] == batch["text"]
        np.testing.assert_array_equal(again["image"], batch["image"])


def test_crops_have_no_buckets(tmp_path):
    path = write_folder(tmp_path, 4)
    with pytest.raises(ConfigError, match="crop and buckets"):
        captioned_data(path, 2, 8, seed=0, crop=4, buckets=Buckets(((8, 8),), np.zeros(4, int)))


def test_more_row_groups_than_are_kept_have_no_buckets(tmp_path):
    """Their images would be read in any order, at the cost of a row group each."""
    pytest.importorskip("pyarrow")
    buckets = Buckets(((8, 8),), np.zeros(2 * KEPT_GROUPS + 1, int))
    path = write_parquet(tmp_path / "many", 2 * KEPT_GROUPS + 1, shard=4, group=2)
    with pytest.raises(ConfigError, match=r"whole row group .* latents\.path; or cache_latents.* tar shards"):
        captioned_data(path, 2, 8, seed=0, buckets=buckets)
    path, few = write_parquet(tmp_path / "few", 2 * KEPT_GROUPS, shard=4, group=2), buckets.numbers[:-1]
    data = captioned_data(path, 2, 8, seed=0, buckets=buckets._replace(numbers=few), epochs=1, threads=1)
    assert sorted(n for batch in data for n in numbers(batch)) == list(range(2 * KEPT_GROUPS))
