"""Training within a given time: what is packed, trained and joined again, on a tiny model."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import jaxdiff
from benchmarks import train_by_time
from jaxdiff.io.images import read_image
from jaxdiff.models.model import build
from tests.support import tiny
from tests.support.stages import UNET

COUNT = 160


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A folder as train.py precomputes it: latents that are all alike, so that a few steps learn them."""
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    pattern = rng.standard_normal(tiny.LATENT)
    (folder / "000000").mkdir()
    values = pattern + 0.1 * rng.standard_normal((COUNT, *tiny.LATENT))
    np.save(folder / "000000" / "latents.npy", values.astype(np.float16))
    np.save(folder / "000000" / "tokens.npy", np.tile(tiny.tokenizer()(["a castle"]), (COUNT, 1)))
    info = {"fingerprint": "a", "model": "b", "parts": ["000000"], "sizes": [list(tiny.LATENT[:2])]}
    (folder / "latents.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a model that is quick to compile."""
    folder = tmp_path_factory.mktemp("start") / "model"
    model = build(tiny.text_config(), UNET, tiny.VAE, tiny.tokenizer(), tiny.SCHEDULER)
    jaxdiff.save(folder, model, tiny.tiny_params(model))
    return folder


@pytest.fixture(scope="module")
def packed(latents, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    train_by_time.main(["pack", "--latents", str(latents), "--out", str(out), "--megabytes", "0.02"])
    return out


def test_packed_latents_are_those_given_within_half_a_step(latents, packed):
    assert len(list(packed.glob("*.npz"))) > 1
    small, tokens, scale = train_by_time.load_packed(packed)
    given = np.load(latents / "000000" / "latents.npy").astype(np.float32)
    assert tokens.shape == (COUNT, tiny.MAX_LENGTH)
    shuffled = given[np.random.default_rng(0).permutation(COUNT)]
    inside = np.abs(shuffled) <= 127 * scale  # beyond it are the farthest ten-thousandth of a channel
    assert inside.mean() > 0.999
    assert (np.abs(small * scale - shuffled)[inside] <= 0.5001 * np.broadcast_to(scale, given.shape)[inside]).all()


@pytest.mark.slow
def test_what_was_trained_is_joined_into_a_model_that_learned(packed, start, tmp_path, capsys):
    flags = ["--packed", str(packed), "--start", str(start), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    sizes = ["--steps", "60", "--batch_size", "16", "--held_out", "32", "--seconds", "3600", "--optimizer", "adamw"]
    more = ["--learning_rate", "1e-2", "--log_every", "10", "--prompts", "a castle"]
    train_by_time.main(["train", *flags, *sizes, *more])
    done = json.loads((tmp_path / "out" / "done.json").read_text())
    assert (done["steps"], done["images"]) == (60, 960)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["factor"] == 0.0
    assert read_image(tmp_path / "out" / "sheet.png").shape == (tiny.SIDE, tiny.SIDE, 3)
    train_by_time.main(
        ["join", "--out", str(tmp_path / "out"), "--start", str(start), "--model", str(tmp_path / "model")]
    )
    before, after = (flatten_dict(jaxdiff.load(folder)[1], sep="/") for folder in (start, tmp_path / "model"))
    assert {name: x.shape for name, x in after.items()} == {name: x.shape for name, x in before.items()}
    assert np.abs(after["unet/conv_in/kernel"] - before["unet/conv_in/kernel"]).max() > 0.01
    assert all((after[name] == before[name]).all() for name in after if name.startswith("vae/"))


def test_fewer_latents_than_are_held_out_are_refused(packed, start, tmp_path):
    flags = ["--packed", str(packed), "--start", str(start), "--out", str(tmp_path), "--held_out", str(COUNT)]
    with pytest.raises(SystemExit, match=f"holds {COUNT} latents: lower --held_out {COUNT}"):
        train_by_time.main(["train", *flags])


def test_pieces_of_another_model_are_refused(start, tmp_path):
    np.save(tmp_path / "weights-0.npy", np.zeros(7, np.float16))
    with pytest.raises(SystemExit, match="holds 7 numbers"):
        train_by_time.join(tmp_path, str(start), tmp_path / "model")
