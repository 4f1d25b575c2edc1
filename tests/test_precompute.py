"""Latents and embeddings written beforehand: the same as computed on the way, whoever writes them."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.data import pipeline
from jaxdiff.data.buckets import Buckets
from jaxdiff.data.captioned import captioned_data, open_source
from jaxdiff.data.latents import LatentShards
from jaxdiff.models.model import encode
from jaxdiff.models.text_encoding import encode_text
from jaxdiff.training.precompute import precompute
from jaxdiff.training.stages import diffusion_stage
from tests.support.image_datasets import write_tars
from tests.support.precompute_in_parts import HOW
from tests.support.tiny import SIDE, tiny_model, tiny_params

COUNT = 11
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def params(model):
    return tiny_params(model)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("data") / "d", COUNT, bad=(4,))


@pytest.fixture(scope="module")
def source(images):
    return open_source(images)


def write(model, params, source, folder, **kwargs):
    precompute(model, params, source, folder, **({"image_size": SIDE} | HOW | kwargs))
    return LatentShards(folder)


@pytest.fixture(scope="module")
def written(model, params, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write(model, params, source, folder)
    return folder


def test_equals_encoding_on_the_way(model, params, source, written):
    shards = LatentShards(written)
    assert len(shards) == 2 * (COUNT - 1)
    views = captioned_data(source, 2 * (COUNT - 1), SIDE, seed=3, epochs=2, shuffle=False, threads=1)
    batch = next(iter(views))
    rows = [shards(i, None) for i in range(len(shards))]
    tokens = model.tokenizer(batch["text"])
    np.testing.assert_array_equal([r["tokens"] for r in rows], tokens)
    expected = {
        "latents": jax.jit(lambda p, x: encode(model, p, x / 255.0))(params, batch["image"].astype(np.float32)),
        "embeddings": jax.jit(lambda p, t: encode_text(model, p, t).embeddings)(params, tokens),
    }
    for name, values in expected.items():
        values = np.asarray(values)
        # float16 rounds by 2**-11 of each value; sums in another order err by less, at the largest value's scale.
        np.testing.assert_allclose(
            np.stack([r[name] for r in rows]).astype(np.float32), values, rtol=2**-11, atol=1e-5 * np.abs(values).max()
        )


@pytest.mark.slow
def test_training_reads_them_like_any_data(model, params, written):
    def batches(**kwargs):
        return iter(captioned_data(written, 4, SIDE, seed=0, threads=2, **kwargs))

    first = batches()
    batch = next(first)
    assert {k: v.shape[0] for k, v in batch.items()} == dict.fromkeys(batch, 4)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first)["latents"] for _ in range(6)]
    again = batches()
    again.set_state(state)
    for latents in expected:
        np.testing.assert_array_equal(next(again)["latents"], latents)
    shares = [
        np.concatenate([b["latents"] for b in batches(epochs=1, drop_remainder=False, host_index=h, host_count=3)])
        for h in range(3)
    ]
    assert sum(map(len, shares)) == 20

    stage = diffusion_stage(model, caption_dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    loss = jax.jit(lambda batch: stage.loss(params, stage.prepare(batch), keys)[0])
    without = {k: v for k, v in batch.items() if k in ("latents", "tokens")}
    # Embeddings rounded by 2**-11, through some ten layers; those of the dropped captions are exact.
    np.testing.assert_allclose(loss(batch), loss(without), rtol=5e-3)
    changed = {**batch, "embeddings": np.asarray(batch["embeddings"]) + np.float16(1)}
    assert abs(loss(changed) - loss(without)) > 1e-4  # they are what is used


def start(data: Path, folder: Path, *args: object) -> subprocess.Popen:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.precompute_in_parts", data, folder, *args]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_in_the_middle_two_processes_go_on_and_share_the_rest(images, written, tmp_path):
    killed = start(images, tmp_path, 0, 1, 0.5)
    while killed.poll() is None and not list(tmp_path.glob("0*")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    with pytest.raises(ConfigError, match="--precompute"):
        LatentShards(tmp_path)  # unfinished
    (tmp_path / ".000003.1").mkdir()  # what a kill in the middle of writing leaves
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("0*")}
    assert 1 <= len(before) < 5
    two = [start(images, tmp_path, i, 2, 0) for i in range(2)]
    said = [process.communicate(timeout=900)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in before} == before  # what was there is not written again
    made = [{int(n) - 1 for n in re.findall(r"Part (\d) of 5", text)} for text in said]
    missing = set(range(5)) - {int(n) for n in before}
    assert made == [{i for i in missing if i % 2 == process} for process in range(2)]  # none twice
    assert files(tmp_path) == files(written)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_latents_of_something_else_are_refused(model, params, source, written, tmp_path):
    with pytest.raises(ConfigError, match="other images, settings or models"):
        write(model, params, source, written, seed=4)
    other = {**params, "vae": jax.tree.map(lambda x: x + 1e-3, params["vae"])}
    with pytest.raises(ConfigError, match="other images, settings or models"):
        write(model, other, source, written)
    for text, said in (
        ("{", "is damaged"),
        ('{"parts": ["x"], "sizes": [[1, 1]], "fingerprint": "", "model": ""}', "x is missing"),
    ):
        (tmp_path / "latents.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            LatentShards(tmp_path)


def test_images_are_read_and_encoded_a_few_at_a_time(model, params, source, written, tmp_path, monkeypatch):
    """Latents hang on the images alone, not on how many are encoded at once."""
    seen, read, collate = [], [], pipeline.collate

    class Counting:
        name, digest, blocks = source.name, source.digest, source.blocks
        __len__ = source.__len__

        def read(self, index, image=True):
            read.append(index)
            return source.read(index, image)

    monkeypatch.setattr(pipeline, "collate", lambda rows: seen.append((len(rows), len(read))) or collate(rows))
    shards = write(model, params, Counting(), tmp_path, batch_size=1, threads=1, part=100)
    assert len(seen) >= len(shards) / jax.local_device_count()
    assert {count for count, _ in seen} == {jax.local_device_count()}
    # Two batches and an image a thread are read ahead, one more is on its way, and one is damaged.
    assert seen[0][1] <= 3 * jax.local_device_count() + 3
    for i in range(len(shards)):
        for name, values in LatentShards(written)(i, None).items():
            scale = 1e-5 * np.abs(values).max()
            np.testing.assert_allclose(shards(i, None)[name], values, rtol=2**-10, atol=scale)  # float16, both
    with pytest.raises(ConfigError, match="batch_size 0 must"):
        write(model, params, source, tmp_path, batch_size=0)


def test_buckets_stay_apart(model, params, source, tmp_path):
    buckets = Buckets(((16, 16), (8, 24)), np.arange(COUNT) % 2)
    shards = write(model, params, source, tmp_path, buckets=buckets, views=1, embeddings=False)
    assert shards.buckets.sizes == ((4, 12), (8, 8))
    shapes = {b["latents"].shape for b in itertools.islice(captioned_data(tmp_path, 2, SIDE, seed=0, threads=1), 9)}
    assert shapes == {(2, 8, 8, 4), (2, 4, 12, 4)}
    assert jnp.isfinite(shards(0, None)["latents"]).all()
    others = buckets._replace(numbers=np.append(buckets.numbers[:-1], 1))  # of the last image alone
    with pytest.raises(ConfigError, match="other images, settings or models"):
        write(model, params, source, tmp_path, buckets=others, views=1, embeddings=False)
