"""What a run refuses and what it tells: other configs, other data, a second run; numbers, images, profiles."""

import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.training.defaults import base
from jaxdiff.training.loop import fit
from jaxdiff.training.metrics import noise_levels
from jaxdiff.training.mfu import PEAKS, Speed, flops, peak_flops
from jaxdiff.training.progress import Report
from jaxdiff.training.trackers import JsonLines, TrackedImages, WandB
from jaxdiff.training.workdir import WorkdirError, data_fingerprint, lock, settle
from tests.support.batches import FromMemory
from tests.support.image_datasets import write_tars
from tests.support.line import LINE, line_data, linear_stage, one_device
from tests.support.processes import ROOT
from tests.support.stages import options
from tests.support.tiny import LATENT, tiny_model, tiny_params, tokenizer
from tests.support.written import write_squares


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"))


# --- the workdir


def settings(**changes) -> dict:
    config = base()
    config.update(changes)
    return json.loads(config.to_json_best_effort())


def test_another_config_is_refused_with_the_difference(tmp_path):
    data = {"files": 3, "digest": "a"}

    def go_on(config, data=data, **kwargs):
        settle(tmp_path, config, data, settings(), **kwargs)

    go_on(settings(learning_rate=0.5))
    go_on(settings(learning_rate=0.1))  # nothing is learnt yet
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(WorkdirError) as refused:
        go_on(settings(learning_rate=0.2, batch_size=8, log_every=1, steps=5))
    assert all(
        x in str(refused.value) for x in ("learning_rate: 0.1 -> 0.2", "batch_size: 64 -> 8", "steps: 10000 -> 5")
    )
    assert "log_every: " not in str(refused.value)
    with pytest.raises(WorkdirError, match=r'data\.digest|"digest": "a"'):
        go_on(settings(learning_rate=0.1), {"files": 3, "digest": "b"})
    go_on(settings(learning_rate=0.1, steps=20_000, log_every=7, fsdp=2, checkpoint_every=3))
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["config"]["steps"] == 20_000
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint"} <= stored["versions"].keys()


def test_a_batch_may_be_taken_in_other_parts_unless_its_loss_depends_on_them(tmp_path):
    """Another number of devices may need it. CLIP's negatives and a discriminator's batch norm are those of a part."""
    for stage in ("unet", "clip", "vae_decoder"):
        work = tmp_path / stage
        work.mkdir()
        settle(work, settings(stage=stage, accumulate=4), {}, settings())
        (work / "checkpoints" / "10").mkdir(parents=True)
    settle(tmp_path / "unet", settings(stage="unet", accumulate=2), {}, settings())
    for stage in ("clip", "vae_decoder"):
        with pytest.raises(WorkdirError, match=r"accumulate: 4 -> 2(?!.*accumulate)"):
            settle(tmp_path / stage, settings(stage=stage, accumulate=2), {}, settings())


def test_a_setting_that_is_new_has_had_its_default(tmp_path, caplog):
    settle(tmp_path, settings(), {}, settings())
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    stored = json.loads((tmp_path / "run.json").read_text())
    del stored["config"]["caption_dropout"]
    stored["versions"]["jax"] = "0.1"
    (tmp_path / "run.json").write_text(json.dumps(stored))
    with pytest.raises(WorkdirError, match=r"caption_dropout: 0.1 -> 0.3"):
        settle(tmp_path, settings(caption_dropout=0.3), {}, settings())
    settle(tmp_path, settings(), {}, settings())
    assert f'jax: "0.1" -> "{jax.__version__}"' in caplog.text


def test_the_fingerprint_knows_names_sizes_and_captions(data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    mark = data_fingerprint(data)
    assert data_fingerprint(copy) == mark
    seen = [mark]
    (copy / "0.png").write_bytes((copy / "0.png").read_bytes() + b"0")
    seen.append(data_fingerprint(copy))
    (copy / "0.png").rename(copy / "other.png")
    seen.append(data_fingerprint(copy))
    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(text.replace("number", "Number"))
    seen.append(data_fingerprint(copy))
    assert len({str(s) for s in seen}) == 4


def test_the_fingerprint_is_of_what_is_read_and_of_nothing_beside_it(data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    mark, plain = data_fingerprint(copy), data_fingerprint(copy, captions=True)
    assert mark["files"] == 10
    assert plain["files"] == 9
    (copy / "run" / "samples").mkdir(parents=True)  # a workdir
    for name in ("run/run.json", "run/samples/step-000001.png", ".DS_Store", "._0.png", "notes.txt"):
        (copy / name).write_bytes(b"1")
    assert data_fingerprint(copy) == mark
    assert data_fingerprint(copy, captions=True) == plain
    (copy / "more.png").write_bytes(b"1")  # not in the metadata
    assert data_fingerprint(copy) == mark
    assert data_fingerprint(copy, captions=True) != plain


def test_the_fingerprint_knows_the_sizes_of_shards_however_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("shards", "shards/{00000..00001}.tar", "shards/00000.tar", Path("shards/00000.tar"))
    marks = []
    for longer in (0, 512):  # bytes: blocks of zeros after the end
        write_tars(Path("shards"), 9)
        with open("shards/00000.tar", "ab") as file:
            file.write(bytes(longer))
        marks.append([data_fingerprint(name) for name in names])
    assert all(a != b for a, b in zip(*marks, strict=True))
    (Path("shards") / "._00000.tar").write_bytes(b"no tar")
    assert [data_fingerprint(name)["files"] for name in names] == [2, 2, 1, 1]


def test_a_second_run_in_a_workdir_is_refused(tmp_path):
    with lock(tmp_path), pytest.raises(WorkdirError, match=f"in use by another run .process {os.getpid()} on "):
        lock(tmp_path).__enter__()
    with lock(tmp_path):
        pass


# --- what is told


@pytest.mark.slow
def test_the_loss_by_noise_level_is_the_same_each_time_and_knows_the_level():
    model = tiny_model()
    params = tiny_params(model)
    silent = {**params, "unet": jax.tree.map(jnp.zeros_like, params["unet"])}
    rng = np.random.default_rng(0)
    tokens = tokenizer()(["a castle"] * 2)
    batches = [{"latents": rng.normal(size=(2, *LATENT)).astype(np.float32), "tokens": tokens} for _ in range(2)]
    measure = noise_levels(model, batches)
    values, again, of_nothing = measure(params), measure(params), measure(silent)
    other = noise_levels(model, batches[:1], seed=1)(params)
    assert values == again
    assert [name for name in values if name != "eval_loss"] == [f"eval_loss_t{t:03d}" for t in range(50, 1000, 100)]
    np.testing.assert_allclose(values["eval_loss"], np.mean([v for k, v in values.items() if k != "eval_loss"]))
    # A network that says nothing is wrong by all of the noise, of unit variance, at every level: 4 images of 256
    # numbers, so that the mean of squares is 1 but for sqrt(2 / 1024) = 0.044.
    np.testing.assert_allclose(list(of_nothing.values()), 1.0, atol=4 * 0.044)
    assert len(set(values.values())) == 11
    assert not set(other.values()) & set(values.values())


def test_flops_are_those_of_the_products_and_peaks_of_the_device():
    x, y = jnp.ones((8, 32)), jnp.ones((32, 16))
    assert flops(jax.jit(jnp.matmul), x, y) == 2 * 8 * 32 * 16

    def device(kind, platform="tpu"):
        return types.SimpleNamespace(device_kind=kind, platform=platform, process_index=0)

    assert peak_flops([device("TPU v5 lite")] * 4) == 4 * 197e12
    assert peak_flops([device("TPU v5")]) == 459e12
    assert peak_flops([device("NVIDIA H100 80GB HBM3", "gpu")]) == PEAKS["NVIDIA H100"]
    assert peak_flops([device("NVIDIA H100 PCIe", "gpu")]) == 756e12
    assert peak_flops([device("Tesla V100-SXM2-16GB", "gpu")]) == 125e12
    assert peak_flops([device("NVIDIA L40", "gpu")]) == 181e12
    for unknown in ("NVIDIA L400", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_flops([device(unknown, "gpu")]) is None
    assert peak_flops(jax.devices()) > 1e8  # measured
    busy = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7, "bytes_in_use": 5})
    idle = types.SimpleNamespace(memory_stats=lambda: None)
    values = Speed(100.0, 1000.0, (busy, idle)).values(2.0)
    assert values == {"flops_per_second": 200.0, "mfu": 0.2, "memory_bytes": 5.0, "memory_peak_bytes": 7.0}
    assert Speed(None, None, (idle,)).values(2.0) == {}


def test_metrics_of_a_killed_run_are_cut_where_it_goes_on(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    tracker = JsonLines(file, start=1)
    tracker.write(2, {"loss": float("nan")})
    tracker.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
    ]


def test_a_run_that_begins_anew_keeps_no_metrics_of_the_one_before(tmp_path):
    """A run that was killed before its first checkpoint begins anew, and evaluates step 0 again."""
    for loss in (1.0, 2.0):
        tracker = JsonLines(tmp_path / "metrics.jsonl", start=0)
        tracker.write(0, {"loss": loss})
        tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 2.0}


def test_weights_and_biases_get_numbers_and_images_and_the_same_run_goes_on(tmp_path, monkeypatch):
    calls = []
    drawn = TrackedImages(np.zeros((2, 4, 4, 3), np.uint8), ("a", "b"))

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(
            id="r1", log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        WandB("p", "", {}, tmp_path)
    wandb = types.SimpleNamespace(init=init, Image=lambda image, caption: (image.shape, caption))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Report((WandB("p", "", {"steps": 3}, tmp_path),), "line", 0, 2, 1, 2) as report:
        report.show(2, {"loss": 0.5, "samples": drawn})
    shown = [((4, 4, 3), "a"), ((4, 4, 3), "b")]
    assert calls[1:] == [(2, {"samples": shown}), (2, {"loss": 0.5}), "finished"]
    assert (calls[0]["project"], calls[0]["name"], calls[0]["id"]) == ("p", None, None)
    WandB("p", "", {}, tmp_path)
    assert calls[-1]["id"] == "r1"


def test_a_profile_is_a_trace_of_some_steps(tmp_path):
    o = options(steps=6, batch_size=3)
    fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path, mesh=one_device(), profile=2)
    assert [p.suffix for p in (tmp_path / "profile").rglob("*.pb")] == [".pb"]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by which ml_collections loads configs
def test_train_py_refuses_in_a_sentence(data, tmp_path, monkeypatch, capsys):
    from jaxdiff.cli import train

    def cli(*args) -> str:
        argv = [
            "train.py",
            f"--config={ROOT}/tests/support/training_config.py:clip",
            f"--config.data.path={data}",
            *args,
        ]
        monkeypatch.setattr(sys, "argv", argv)
        assert train.main(argv) == 1
        return capsys.readouterr().err

    work = tmp_path / "run"
    work.mkdir()
    with lock(work):
        assert re.fullmatch(
            r"train.py: error: The workdir \S+ is in use by another run .*\.\n", cli(f"--workdir={work}")
        )
    settle(work, settings(stage="clip", batch_size=4, seed=3), data_fingerprint(data), settings())
    (work / "checkpoints" / "3").mkdir(parents=True)
    error = cli(f"--workdir={work}")
    assert "seed: 3 -> 0" in error
    assert error.count("\n") == 1
