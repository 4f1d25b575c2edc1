"""Every kind of data: what is read, in which order and by whom."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.data import store
from jaxdiff.data.captioned import captioned_data, open_source
from jaxdiff.data.orders import BlockOrder
from tests.support.image_datasets import SIZE, WRITERS, numbers

COUNT = 13


def need(kind):
    if kind in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """kind -> the folder of thirteen images of that kind, two of them bad."""
    made = {}

    def get(kind):
        need(kind)
        if kind not in made:
            made[kind] = WRITERS[kind](tmp_path_factory.mktemp(kind) / "data", COUNT, bad=(3, 8))
        return made[kind]

    return get


def stream(path, batches=None, batch_size=4, **kwargs):
    data = captioned_data(path, batch_size, SIZE, seed=0, **{"threads": 2, **kwargs})
    return [n for batch in itertools.islice(data, batches) for n in numbers(batch)]


GOOD = [i for i in range(COUNT) if i not in (3, 8)]
kinds = pytest.mark.parametrize("kind", sorted(WRITERS))


@kinds
def test_an_epoch_is_every_readable_image_once(written, kind, caplog):
    data = captioned_data(written(kind), 1, SIZE, seed=0, epochs=2, threads=2)
    seen = [n for batch in data for n in numbers(batch)]
    assert sorted(seen[: len(GOOD)]) == sorted(seen[len(GOOD) :]) == GOOD
    assert seen[: len(GOOD)] != seen[len(GOOD) :]
    assert data.skipped.count == 4
    assert len([r for r in caplog.records if "is skipped" in r.getMessage()]) == 2
    assert stream(written(kind), batch_size=1, epochs=1, shuffle=False) == GOOD


@kinds
@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_an_epoch(written, kind, hosts):
    shares = [stream(written(kind), batch_size=1, epochs=1, host_index=h, host_count=hosts) for h in range(hosts)]
    assert sorted(itertools.chain(*shares)) == GOOD
    assert all(shares)


@kinds
def test_other_hosts_go_on_with_the_same_batches(written, kind):
    """Two hosts, then one and three, in the middle of an epoch."""

    def hosts(count, state=None):
        shares = [{"host_index": h, "host_count": count} for h in range(count)]
        found = [
            iter(captioned_data(written(kind), 6 // count, SIZE, seed=5, flip=True, threads=1, **s)) for s in shares
        ]
        for iterator in found:
            if state:
                iterator.set_state(state)
        return found

    def batch(iterators):
        parts = [next(iterator) for iterator in iterators]
        return [t for part in parts for t in part["text"]], np.concatenate([part["image"] for part in parts])

    two = hosts(2)
    for _ in range(3):
        batch(two)
    states = [json.loads(json.dumps(iterator.get_state())) for iterator in two]
    assert states[0] == states[1]
    assert states[0]["examples"] == 18
    others = [hosts(1, states[0]), hosts(3, states[0])]
    for _ in range(5):
        texts, images = batch(two)
        for iterators in others:
            again, same_images = batch(iterators)
            assert again == texts
            np.testing.assert_array_equal(same_images, images)


@kinds
def test_resumes_exactly_with_other_threads(written, kind):
    first = iter(captioned_data(written(kind), 3, SIZE, seed=5, flip=True, threads=1))
    for _ in range(4):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(6)]
    second = iter(captioned_data(written(kind), 3, SIZE, seed=5, flip=True, threads=3))
    next(second)
    second.set_state(state)
    for batch in expected:
        again = next(second)
        assert again["text"] == batch["text"]
        np.testing.assert_array_equal(again["image"], batch["image"])
    second.close()


@pytest.mark.slow
@kinds
def test_workers_may_be_resized_on_the_way(written, kind):
    expected = stream(written(kind), 9)
    batches = iter(captioned_data(written(kind), 4, SIZE, seed=0, threads=2))
    seen = [n for _ in range(3) for n in numbers(next(batches))]
    batches.resize(workers=2, threads=1)
    seen += [n for _ in range(3) for n in numbers(next(batches))]
    batches.resize(workers=0)
    seen += [n for _ in range(3) for n in numbers(next(batches))]
    assert seen == expected


@kinds
def test_metadata_comes_along(written, kind):
    source = open_source(written(kind))
    assert len(source) == COUNT
    record = source.read(7)
    assert record.captions == ("7", "number 7")
    assert record.extras["score"] == pytest.approx(0.7)
    assert source.digest == open_source(written(kind)).digest
    assert source.read(7, image=False).captions == record.captions


def test_a_position_in_an_older_checkpoint_is_read(written):
    data = captioned_data(written("tar"), 2, SIZE, seed=0, threads=1)
    first, second = iter(data), iter(data)
    next(first)
    state = first.get_state()
    assert state == {"examples": 2, "host_shards": 1}
    second.set_state({"examples": 2, "lanes": 1})
    assert next(first)["text"] == next(second)["text"]
    first.close()
    second.close()


def test_a_state_of_another_kind_is_refused(written):
    with pytest.raises(ConfigError, match="another version"):
        iter(captioned_data(written("tar"), 2, SIZE, seed=0)).set_state({"next": 3})


# Blocks


def test_blocks_are_read_by_one_host_and_few_at_a_time():
    counts = np.random.default_rng(0).integers(1, 9, 23)
    ends = np.cumsum(counts)
    seen = []
    for shard in range(3):
        order = BlockOrder(counts, seed=1, shuffle=True, epochs=None, host_shard=shard, host_shards=3)
        for epoch in range(2):
            found = [order[epoch * order.size + i] for i in range(order.size)]
            blocks = np.searchsorted(ends, found, "right")
            assert len(set(found)) == len(found)
            # Once a window of four is over, none of its blocks comes again.
            changes = [len(set(blocks[:i]) & set(blocks[i:])) for i in range(len(blocks))]
            assert max(changes) <= 4
        seen += found
    assert sorted(seen) == list(range(counts.sum()))
    with pytest.raises(ConfigError, match="2 row groups are too few for 3 hosts"):
        BlockOrder(counts[:2], seed=0, shuffle=True, epochs=1, host_shard=0, host_shards=3)


# Parts shared by hosts


def test_hosts_divide_the_work_and_each_has_all_of_it(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    made = []

    def work(host):
        def make(i):
            made.append((host, i))
            return {"x": np.full(2, i)}

        store.fill(tmp_path, [str(i) for i in range(7)], make, host_index=host, host_count=3)
        rows = store.Rows([str(tmp_path / str(i)) for i in range(7)])
        return [int(rows[i][1]["x"]) for i in range(len(rows))]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    assert results == [[i // 2 for i in range(14)]] * 3
    assert sorted(made) == sorted((i % 3, i) for i in range(7))


def test_the_folder_of_parts_is_looked_through_once(tmp_path, monkeypatch):
    """However many parts there are; what a killed process left of this host's parts is gone, others' stays."""
    for name in (".3.77", ".4.77"):
        (tmp_path / name).mkdir()
    looks, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda *a: looks.append(a) or listdir(*a))
    monkeypatch.setattr(Path, "glob", lambda *a: pytest.fail("looked through again"))
    names = [str(i) for i in range(50)]
    for name in names[::2]:
        store.write_part(tmp_path / name, {"x": np.zeros(1)})
    store.fill(tmp_path, names, lambda i: {"x": np.full(1, i)}, host_index=1, host_count=2)
    assert len(looks) == 2
    assert {p.name for p in tmp_path.iterdir()} == {*names, ".4.77"}


def test_waiting_for_other_hosts_asks_ever_more_rarely(tmp_path, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 30:
            store.write_part(tmp_path / "1", {"x": np.zeros(1)})

    monkeypatch.setattr("time.sleep", sleep)
    store.fill(tmp_path, ["0", "1"], lambda i: {"x": np.zeros(1)}, host_index=0, host_count=2)
    assert pauses[0] <= 0.1
    assert pauses == sorted(pauses)
    assert pauses[-1] == store.LONGEST_PAUSE
    assert len(pauses) == 30


def test_a_damaged_part_is_named(tmp_path):
    store.fill(tmp_path, ["a"], lambda i: {"x": np.arange(3)})
    (tmp_path / "a" / "x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match=r"a is damaged .*: delete that folder"):
        store.read_part(tmp_path / "a")
