"""train.py: the stages one after the other on a folder of images, and one sentence for every mistake."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import open_source
from jaxdiff.data.filters import select
from jaxdiff.data.folder import examples
from jaxdiff.data.latents import LatentShards
from jaxdiff.io.images import read_image
from jaxdiff.io.tensor_files import open_tensors
from jaxdiff.training.run import build_run
from tests.support.processes import CONFIG, ROOT, free_port
from tests.support.training_config import get_config

# ml_collections loads configs by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve see-through squares with captions: three colours in four styles."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(12):
        name, style = list(COLOURS)[i % 3], ["flat", "3d", "line", "oil"][i // 3]
        image = np.zeros((16, 16, 4), np.uint8)
        image[2 + i // 4 : 12, 3:13] = (*COLOURS[name], 255)
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"a {name} square, {style}", "subject": name, "style": style})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def vae(data, tmp_path_factory) -> tuple[Path, str]:
    """(workdir, what it said) of a trained autoencoder. In a process of its own: here pytest has the log."""
    workdir = tmp_path_factory.mktemp("vae")
    command = [sys.executable, "train.py", f"--config={CONFIG}:vae", f"--workdir={workdir}", "--config.steps=2"]
    command += [f"--config.data.path={data}", "--config.data.filter.max_caption=18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "step 2/2:" in done.stdout
    return workdir, done.stderr


@pytest.mark.slow
def test_it_says_which_images_are_left_out(vae):
    _, said = vae
    assert re.search(r"train\.py: \d+ of 12 images", said)
    assert "orbax" not in said


@pytest.mark.slow
def test_the_stages_one_after_the_other_make_a_model_that_draws(train_cli, data, vae, tmp_path):
    path = f"--config.data.path={data}"
    code, out, err = train_cli(f"--config={CONFIG}:clip", f"--workdir={tmp_path}/clip", path)
    assert code == 0, err
    assert "step 4/4:" in out
    parts = [f"--config.init_from.vae={vae[0]}/export", f"--config.init_from.text_encoder={tmp_path}/clip/export"]
    more = [
        "--config.cache_latents=2",
        "--config.data.filter.style=('flat', '3d')",
        "--config.eval.prompts=('a square',)",
        "--config.ema_sigmas=(0.05, 0.1)",
        "--config.snapshot_every=1",
        "--config.schedule=constant",  # the same program whatever the number of steps
    ]
    command = [f"--config={CONFIG}:unet", f"--workdir={tmp_path}/unet", path, *parts, *more]
    code, out, err = train_cli(*command)
    assert code == 0, err

    work = tmp_path / "unet"
    assert json.loads((work / "run.json").read_text())["config"]["cache_latents"] == 2
    assert read_image(work / "samples" / "step-000004.png").shape == (16, 16, 3)
    (latents,) = (LatentShards(folder) for folder in work.glob("latents-*"))
    assert len(latents) == 2 * 6  # two views of six images
    events = b"".join(p.read_bytes() for p in (work / "tb").iterdir())
    assert b"samples/0" in events
    assert b"a square" in events
    model, params = jaxdiff.load(work / "export")
    (autoencoder, _), clip = jaxdiff.load(vae[0] / "export"), jaxdiff.load(tmp_path / "clip" / "export")
    assert model.vae.config == autoencoder.vae.config
    assert model.tokenizer == clip[0].tokenizer == autoencoder.tokenizer
    np.testing.assert_array_equal(
        jax.tree.leaves(params["text_encoder"])[0], jax.tree.leaves(clip[1]["text_encoder"])[0]
    )
    images = np.stack([read_image(e.path) for e in examples(data)]) / 255.0
    scaled = np.asarray(jaxdiff.encode(model, params, images))
    # Measured on other backgrounds than these; the factor of a random autoencoder would be off by more.
    assert 0.5 < scaled.std() < 2
    assert model.vae.config.scaling_factor != 0.18215

    code, _, err = train_cli(f"--workdir={work}", "--posthoc_ema=0.1")  # a length that was tracked, hence the same
    assert code == 0, err
    tracked = open_tensors(work / "ema" / "4.safetensors").read("0.1:unet/conv_in/kernel")
    kernel = jaxdiff.load(work / "export-ema-0.1")[1]["unet"]["conv_in"]["kernel"]
    # Weights of up to some ten, each rounded in the solution of a system that is nearly singular.
    np.testing.assert_allclose(kernel, tracked, atol=1e-5 * np.abs(tracked).max())
    assert np.abs(kernel - params["unet"]["conv_in"]["kernel"]).max() > 1e-4 * np.abs(tracked).max()

    before = (work / "export" / "unet" / "config.json").stat().st_mtime_ns
    code, out, err = train_cli(*command, "--config.steps=6")  # goes on
    assert code == 0, err
    assert "goes on from step 4" in out
    assert "images encoded" not in err  # the latents are there already
    assert (work / "export" / "unet" / "config.json").stat().st_mtime_ns != before


@pytest.mark.slow
def test_a_pretrained_model_learns_a_folder(train_cli, data, tiny_folder, tmp_path):
    code, _, err = train_cli(
        f"--config={ROOT}/configs/folder.py", f"--workdir={tmp_path}", f"--config.data.path={data}",
        f"--config.init_from.model={tiny_folder}", "--config.steps=2", "--config.batch_size=4",
    )  # fmt: skip
    assert code == 0, err
    model, params = jaxdiff.load(tmp_path / "export")
    first, first_params = jaxdiff.load(tiny_folder)
    assert model == first
    for part, changed in (("unet", True), ("vae", False), ("text_encoder", False)):
        pairs = zip(jax.tree.leaves(params[part]), jax.tree.leaves(first_params[part]), strict=True)
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs) == changed, part


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        ((), 2, "--config is missing"),
        (("--config=nowhere.py", "--workdir={tmp}"), 2, "nowhere.py"),
        (("--config={config}",), 2, "--workdir is missing"),
        (("--workdir={tmp}", "--posthoc_ema=0.3"), 2, "--posthoc_ema=0.3 must be above 0 and below 0.289"),
        (("--workdir={tmp}", "--posthoc_ema=0.1"), 1, "run.json cannot be read"),
        (("--config={config}", "--workdir={tmp}"), 2, "config.data.path is missing"),
        (("--config={config}", "--workdir={tmp}", "--config.stpes=3"), 2, "stpes"),
        (("--config={config}", "--workdir={tmp}", "--config.steps=many"), 2, "many"),
        (("--config={config}:wgan", "--workdir={tmp}", "--config.data.path={data}"), 2, "config.stage 'wgan'"),
        (("--config={config}", "--workdir={tmp}", "--config.data.path={data}", "extra"), 2, "extra"),
        (("--config={config}", "--workdir={tmp}", "--config.data.path=nowhere"), 1, "--config.data.path: The data"),
        (("--config={config}", "--workdir={data}/0.png", "--config.data.path={data}"), 1, "--workdir"),
        (
            ("--config={config}", "--workdir={tmp}", "--config.data.path={data}", "--config.batch_size=5",
             "--config.accumulate=2"), 2, "batch_size 5 must be divisible",
        ),
        (
            ("--config={config}:unet", "--workdir={tmp}", "--config.data.path={data}", "--config.init_from.vae=gone"),
            1, "--config.init_from.vae: gone is neither a folder",
        ),
        (
            ("--config={config}:unet", "--workdir={tmp}", "--config.data.path={data}", "--config.crop=8"),
            2, "config.crop=8: the stage unet does not read this",
        ),
        (
            ("--config={config}:vae", "--workdir={tmp}", "--config.data.path={data}", "--config.latents.path=x"),
            2, "config.latents.path=x: the stage vae",
        ),
        (
            ("--config={config}", "--workdir={tmp}", "--config.data.path={data}", "--config.data.filter.style=('x',)"),
            1, "data.filter leaves no image of the",
        ),
        (
            ("--config={config}", "--workdir={tmp}", "--config.data.path={data}",
             "--config.model.unet.cross_attention_dim=8"), 1, "cross_attention_dim is 8",
        ),
    ],
)  # fmt: skip
def test_every_mistake_is_one_sentence(train_cli, data, tmp_path, args, code, named):
    places = {"tmp": tmp_path / "run", "data": data, "config": CONFIG}
    got, _, err = train_cli(*(a.format(**places) for a in args))
    assert got == code, err
    assert err.count("\n") == 1
    assert err.startswith("train.py: error: ")
    assert named in err


def test_workers_of_the_config_read_what_its_threads_read(data, tiny_folder, tmp_path):
    config = get_config("vae")
    config.data.path, config.init_from.model = str(data), str(tiny_folder)
    run = build_run(config, tmp_path)
    expected = [batch for batch, _ in zip(run.batches(), range(3), strict=False)]
    config.data.workers = 1
    before, batches = set(multiprocessing.active_children()), iter(run.batches())
    for batch in expected:
        again = next(batches)
        assert again["text"] == batch["text"]
        np.testing.assert_array_equal(again["image"], batch["image"])
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 1
    batches.close()


def test_it_runs_as_a_program():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--workdir" in done.stdout


def test_a_selection_has_the_same_images_and_nothing_else(data):
    source = open_source(data)
    chosen = select(source, {"style": ("flat", "oil"), "max_subjects": 2})
    found = [chosen.read(i) for i in range(len(chosen))]
    assert {(r.extras["style"], r.extras["subject"]) for r in found} == {
        (style, subject) for style in ("flat", "oil") for subject in ("blue", "green")
    }  # by name, for each subject has as many images
    originals = {e.captions: e.path for e in examples(data)}
    assert all(r.image == originals[r.captions] for r in found)
    with pytest.raises(ConfigError, match=r"data\.filter"):
        select(source, {"style": ("watercolour",)})


@pytest.mark.slow
def test_latents_are_written_and_trained_on(train_cli, data, tiny_folder, tmp_path):
    """At the images' own aspects, filtered; and with a model that they do not fit."""
    settings = [f"--config={ROOT}/configs/folder.py", f"--config.data.path={data}", "--config.cache_latents=0"]
    settings += [f"--config.init_from.model={tiny_folder}", "--config.steps=2", "--config.batch_size=4"]
    settings += ["--config.accumulate=1", "--config.remat="]
    more = ["--config.data.buckets=4", "--config.data.filter.min_side=10", "--config.latents.embeddings=True"]
    code, _, err = train_cli(*settings, *more, f"--workdir={tmp_path}/a", "--precompute")
    assert code == 0, err
    assert (tmp_path / "a" / "latents" / "latents.json").is_file()
    latents = f"--config.latents.path={tmp_path}/a/latents"
    code, out, err = train_cli(*settings, *more, latents, f"--workdir={tmp_path}/b")
    assert code == 0, err
    assert "step 2/2:" in out or (tmp_path / "b" / "export").is_dir()
    assert not (tmp_path / "b" / "data").exists()  # nothing is filtered again
    mark = json.loads((tmp_path / "b" / "run.json").read_text())["data"]["latents"]
    assert mark == LatentShards(tmp_path / "a" / "latents").fingerprint
    copied = tmp_path / "copied"
    shutil.copytree(data, copied)
    (copied / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().replace("square", "box"))
    other = [f"--config.data.path={copied}", "--config.data.filter.min_side=12", "--config.data.image_size=12"]
    code, _, err = train_cli(*settings, *more, latents, f"--workdir={tmp_path}/c", *other, "--config.data.buckets=8")
    assert code == 1
    for said in ("min_side: 10, now 12", "buckets: 4, now 8", "image_size: 16, now 12", "digest of data.path"):
        assert said in err
    info = tmp_path / "a" / "latents" / "latents.json"
    older = json.loads(info.read_text())
    del older["made"]["data.warp.rotate"]  # as of a version that had no such setting
    info.write_text(json.dumps(older))
    code, _, err = train_cli(*settings, *more, latents, f"--workdir={tmp_path}/c", "--config.data.warp.rotate=5.0")
    assert (code, "data.warp.rotate: null, now 5.0" in err) == (1, True), err
    code, _, err = train_cli(
        *settings, *more, latents, f"--workdir={tmp_path}/d", "--config.trainable=('text_encoder',)"
    )
    assert code == 1
    assert "holds text embeddings" in err
    code, _, err = train_cli(*settings, *more, latents, f"--workdir={tmp_path}/a", "--precompute")
    assert code == 2
    assert "leave out config.latents.path" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workdirs", "count", "sentence"),
    [
        (("a", "b"), 0, "process 1 sees another folder than process 0: give one that all hosts share"),
        (("a", "a"), 1, "config.data: process 1 has other files or captions than process 0"),
    ],
)
def test_hosts_that_see_other_folders_are_told_so(data, tmp_path, workdirs, count, sentence):
    other = shutil.copytree(data, tmp_path / "data")
    lines = (other / "metadata.jsonl").read_text().splitlines()
    (other / "metadata.jsonl").write_text("\n".join(lines[count:]))
    port, both = free_port(), []
    for i, (workdir, path) in enumerate(zip(workdirs, (data, other), strict=True)):
        command = [sys.executable, str(ROOT / "train.py"), f"--config={CONFIG}:vae", f"--workdir={workdir}"]
        command += [f"--config.data.path={path}", f"--coordinator_address=localhost:{port}", "--num_processes=2"]
        command.append(f"--process_id={i}")
        both.append(subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True))
    said = [process.communicate(timeout=900)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    assert all(sentence in err for err in said)
    assert not list(tmp_path.glob("*/*host*"))
    assert not (tmp_path / "b").exists()
