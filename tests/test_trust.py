"""What may befall a run: kills, damaged checkpoints, full disks, other configs, a second run, other devices."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.common import base
from jaxdiff.config import ConfigError
from jaxdiff.io import checkpoint
from jaxdiff.io.checkpoint import SUMS, CheckpointError, Checkpoints, damage
from jaxdiff.training.evaluate import noise_levels
from jaxdiff.training.loop import fit
from jaxdiff.training.report import Report
from jaxdiff.training.speed import PEAKS, Speed, flops, peak_flops
from jaxdiff.training.trackers import JsonLines, Pictures, WandB
from jaxdiff.training.workdir import Lock, WorkdirError, data_fingerprint, settle
from tests.batches import FromMemory
from tests.datasets_of_pictures import write_tars
from tests.test_training import options
from tests.test_training_devices import finish, start
from tests.test_training_loop import LINE, line_data, linear_stage, one_device, same
from tests.tiny import LATENT, SIDE, tiny_model, tiny_params, tokenizer
from tests.train_on_hosts import write_pictures

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [{"file_name": f"{i}.png", "text": [f"a square {i}", f"number {i}"]} for i in range(9)]
    for i, line in enumerate(lines):
        Image.fromarray(np.full((SIDE, SIDE, 3), 25 * i, np.uint8)).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


# --- kill -9


class Runs:
    """A command line of train.py in a process of its own, with compiled programs kept between runs."""

    def __init__(self, stage: str, data: Path, cache: Path, steps: int) -> None:
        self.steps = steps
        settings = {"steps": steps, "log_every": 1, "checkpoint_every": 3, "data.path": data, "data.flip": True}
        self._command = [sys.executable, "train.py", f"--config=tests/training_config.py:{stage}"]
        self._command += [f"--config.{k}={v}" for k, v in settings.items()]
        quick = {"XDG_CACHE_HOME": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
        self._env = {**os.environ, **quick}

    def start(self, workdir: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*self._command, f"--workdir={workdir}"],
            cwd=ROOT, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(self, workdir: Path) -> list[dict]:
        process = self.start(workdir)
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 0, error
        return metrics(workdir)

    def kill(self, workdir: Path, wish, delay: float) -> list[dict]:
        """Kill -9 a while after `wish()` is true; the metrics of before."""
        process = self.start(workdir)
        try:
            deadline = time.monotonic() + 300
            while process.poll() is None and not wish():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(delay)
            assert process.poll() is None, process.stderr.read()
        finally:
            process.kill()
            process.communicate()
        return metrics(workdir)


def metrics(workdir: Path) -> list[dict]:
    """What two runs must have in common, by step; the last line may be half written."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: line[k] for k in ("step", "loss", "grad_norm")} for line in lines if "loss" in line]


def check_kills(runs: Runs, tmp_path: Path, moments: list[str], seed: int) -> None:
    """Kill a run at these moments, then let it end: each loss ever written is that of a run that nobody killed."""
    unbroken = runs.finish(tmp_path / "unbroken")
    assert [line["step"] for line in unbroken] == list(range(1, runs.steps + 1))
    rng, workdir, reached = random.Random(seed), tmp_path / "killed", 0
    for i, moment in enumerate(moments):
        aim = rng.randint(reached + 1, max(reached + 1, (i + 1) * runs.steps // (len(moments) + 1)))

        def far() -> bool:
            seen = metrics(workdir)
            return bool(seen) and seen[-1]["step"] >= aim  # noqa: B023

        def writing() -> bool:
            return far() and any((workdir / "checkpoints").glob("*tmp*"))

        seen = runs.kill(workdir, {"start": lambda: True, "step": far, "write": writing}[moment], rng.random() * 0.01)
        assert seen == unbroken[: len(seen)], moment
        left = [p.name for p in (workdir / "checkpoints").glob("*tmp*")]
        print(f"kill {i}: {moment}, at step {len(seen)}, half-written: {left}")
        reached = max(reached, len(seen))
    assert runs.finish(workdir) == unbroken
    ends = [tmp_path / name / "export" / "text_encoder" / "model.safetensors" for name in ("unbroken", "killed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_killed_run_goes_on_as_if_nothing_had_been(data, tmp_path):
    check_kills(Runs("clip", data, tmp_path / "cache", 24), tmp_path, ["step", "write"], seed=0)


@pytest.mark.slow
def test_a_run_killed_ten_times_goes_on_as_if_nothing_had_been(data, tmp_path):
    moments = ["start", "step", "write", "step", "write", "step", "step", "write", "step", "write"]
    check_kills(Runs("unet", data, tmp_path / "cache", 120), tmp_path, moments, seed=1)


# --- checkpoints


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with the checkpoints 1, 2 and 3. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"next": step})
    return folder


def tree(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"w": jnp.asarray(rng.normal(size=(64, 100)), jnp.float32), "step": jnp.int32(step)}


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_every_damage_of_any_file_is_noticed(written, tmp_path, how):
    files = [p.relative_to(written / "3") for p in (written / "3").rglob("*") if p.is_file()]
    files = [p for p in files if str(p) not in checkpoint.UNCHECKED or p.name == SUMS]
    assert damage(written / "3") is None
    assert len(files) > 5
    for file in files:
        shutil.copytree(written / "3", tmp_path / "3")
        spoil(tmp_path / "3" / file, how)
        assert str(file) in damage(tmp_path / "3")
        shutil.rmtree(tmp_path / "3")


def test_the_newest_intact_checkpoint_is_used_and_the_damaged_ones_named(written, tmp_path, caplog):
    shutil.copytree(written, tmp_path / "c")
    largest = max((tmp_path / "c" / "3").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    spoil(largest, "flipped")  # orbax restores other numbers and says nothing
    spoil(tmp_path / "c" / "2" / "data" / "metadata", "truncated")
    (tmp_path / "c" / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # a kill in the middle of writing
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        assert checkpoints.latest == 1
        state, position = checkpoints.restore(tree(0))
        assert same(state, tree(1))
        assert position == {"next": 1}
        for name in (largest.name, "data/metadata", "damaged-3", "damaged-2"):
            assert name in caplog.text
        for step in (2, 3):
            checkpoints.save(step, tree(step), {"next": step})
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"1", "2", "3", "damaged-2", "damaged-3"}


def test_no_run_begins_anew_over_damaged_checkpoints(written, tmp_path):
    for step in ("1", "2"):
        shutil.copytree(written / step, tmp_path / step)
        spoil(tmp_path / step / SUMS, "truncated")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint \(2: sha256.json .*; 1: sha256.json"):
        Checkpoints(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_a_full_disk_ends_the_run_in_a_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    def run(steps):
        o = options(steps=steps, batch_size=3, checkpoint_every=2, schedule="constant")
        return fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path / "a", mesh=one_device())

    run(4)

    def full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "digests", lambda folder, real=checkpoint.digests: (
            full(folder) if "tmp" in folder.name else real(folder)
        ))  # fmt: skip
        with pytest.raises(CheckpointError, match=r"checkpoints/6 cannot be written \(No space left on device\): free"):
            run(8)
    with Checkpoints(tmp_path / "a" / "checkpoints") as checkpoints:
        assert checkpoints.latest == 4
    o = options(steps=8, batch_size=3, schedule="constant")
    unbroken = fit(linear_stage(), LINE, FromMemory(line_data(), 3, 7), o, tmp_path / "b", mesh=one_device())
    assert same(run(8), unbroken)


# Writes of tensorstore that come after the refused one find nobody waiting for them.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")
def test_what_the_system_refuses_to_write_leaves_the_last_checkpoint(written, tmp_path):
    """As on a full disk, the system itself says no in the middle of a file."""
    shutil.copytree(written, tmp_path / "c")

    def save() -> None:
        before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Checkpoints(tmp_path / "c") as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))  # bytes; the numbers take 25,600
            try:
                checkpoints.save(4, tree(4), {"next": 4})
                checkpoints.save(5, tree(5), {"next": 5})  # waits for the one before
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))

    with pytest.raises(CheckpointError, match=r"c/4 cannot be written \(.*File too large.*\): free space"):
        save()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest == 3
        assert same(checkpoints.restore(tree(0))[0], tree(3))


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(WorkdirError, match="file/lock cannot be written"):
        Lock(tmp_path / "file").__enter__()
    with pytest.raises(WorkdirError, match="cannot be written"):
        JsonLines(tmp_path / "file" / "metrics.jsonl", 0)


# --- devices and hosts


def test_other_devices_and_meshes_go_on(tmp_path):
    finish(start("tests.train_on_meshes", tmp_path, devices=4))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == [1, 4, 2]
    assert report["restored"] == [True, True]  # bit for bit, and divided as the new mesh says
    # Sums in another order, by nine of Adam's updates.
    np.testing.assert_allclose(report["losses"], report["unbroken"], rtol=1e-4)


def test_a_notice_to_one_host_stops_all_at_the_same_step(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    data = write_pictures(tmp_path / "data")
    processes = [start("tests.train_on_hosts", port, i, 2, data, tmp_path, 10**6, devices=1) for i in range(2)]
    while not metrics(tmp_path) and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(*processes)
    stopped = {int(np.load(tmp_path / f"result-{i}.npz")["step"]) for i in range(2)}
    assert len(stopped) == 1
    assert stopped.pop() == max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) < 10**6


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


def test_a_batch_may_be_taken_in_other_parts_unless_its_loss_is_contrastive(tmp_path):
    """Another number of devices may need it; CLIP's negatives are those of a part."""
    for stage in ("unet", "clip"):
        work = tmp_path / stage
        work.mkdir()
        settle(work, settings(stage=stage, accumulate=4), {}, settings())
        (work / "checkpoints" / "10").mkdir(parents=True)
    settle(tmp_path / "unet", settings(stage="unet", accumulate=2), {}, settings())
    with pytest.raises(WorkdirError, match=r"accumulate: 4 -> 2(?!.*accumulate)"):
        settle(tmp_path / "clip", settings(stage="clip", accumulate=2), {}, settings())


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
    with Lock(tmp_path), pytest.raises(WorkdirError, match=f"in use by another run .process {os.getpid()} on "):
        Lock(tmp_path).__enter__()
    with Lock(tmp_path):
        pass


# --- what is told


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
    # A network that says nothing is wrong by all of the noise, of unit variance, at every level: 4 pictures of 256
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


def test_weights_and_biases_get_numbers_and_pictures_and_the_same_run_goes_on(tmp_path, monkeypatch):
    calls = []
    drawn = Pictures(np.zeros((2, 4, 4, 3), np.uint8), ("a", "b"))

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(
            id="r1", log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"jaxdiff\[wandb\]"):
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
    import train

    def cli(*args) -> str:
        argv = ["train.py", f"--config={ROOT}/tests/training_config.py:clip", f"--config.data.path={data}", *args]
        monkeypatch.setattr(sys, "argv", argv)
        before = jax.config.jax_compilation_cache_dir
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert train.main(argv) == 1
        jax.config.update("jax_compilation_cache_dir", before)
        return capsys.readouterr().err

    work = tmp_path / "run"
    work.mkdir()
    with Lock(work):
        assert re.fullmatch(
            r"train.py: error: The workdir \S+ is in use by another run .*\.\n", cli(f"--workdir={work}")
        )
    settle(work, settings(stage="clip", batch_size=4, seed=3), data_fingerprint(data), settings())
    (work / "checkpoints" / "3").mkdir(parents=True)
    error = cli(f"--workdir={work}")
    assert "seed: 3 -> 0" in error
    assert error.count("\n") == 1
