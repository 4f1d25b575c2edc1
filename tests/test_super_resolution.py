"""Training an upscaling network: degradations by seed, a run that goes on after a stop, and what it exports."""

import importlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

import jaxdiff
from configs.icons import sizes
from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.data.degradation import Degradation, blur
from jaxdiff.io.images import read_image
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.training.checks import check_settings
from jaxdiff.training.options import Options
from jaxdiff.training.super_resolution import init_network, make, network_config, super_resolution_stage
from tests.support.processes import ROOT

# ml_collections loads configs by a method that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
CONFIG = f"--config={ROOT}/configs/upscaler/x4.py:cpu"


SMALL = RRDBConfig(num_block=1, num_feat=8, num_grow_ch=4)


def image(side=32, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((side, side)))


def test_degradations_follow_from_the_seed_and_the_image():
    images = [image(seed=i) for i in range(12)]
    degrade = Degradation(4, seed=3, clean=0.2)
    first, again = ([degrade(x) for x in images] for _ in range(2))
    assert all(x.shape == (8, 8, 3) and x.dtype == np.uint8 for x in first)
    np.testing.assert_array_equal(first, again)
    other = [Degradation(4, seed=4, clean=0.2)(x) for x in images]
    assert sum(np.array_equal(x, y) for x, y in zip(first, other, strict=True)) < 4
    # Small and damaged, but the same images.
    small = [np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BOX)) for x in images]
    errors = np.abs(np.stack(first).astype(int) - small).mean((1, 2, 3))
    assert 1 < errors.mean() < 30


def test_clean_images_are_only_resized():
    x = np.full((16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(Degradation(2, clean=1.0)(x), np.full((8, 8, 3), 77))
    assert (Degradation(2, clean=0.0)(x) != 77).any()


def test_a_blur_is_the_convolution_with_its_kernel():
    from scipy.ndimage import convolve

    x = image(24)
    kernel = np.random.default_rng(1).random((15, 15))
    kernel /= kernel.sum()
    expected = np.stack([convolve(x[..., i].astype(float), kernel, mode="mirror") for i in range(3)], -1)
    assert np.abs(blur(x, kernel) - np.clip(np.round(expected), 0, 255)).max() <= 1


def config_of(**settings):
    config = importlib.import_module("configs.upscaler.x4").get_config("cpu")
    config.data.path = "data/icons"
    config.update(settings)
    return config


@pytest.mark.slow
def test_a_fresh_network_begins_as_a_linear_enlargement():
    config = config_of()
    module = make(config, shapes_only=True).upscaler
    params = init_network(module, jax.random.key(0))
    small = np.asarray(Image.fromarray(image(16)), np.float32)[None] / 255
    with jax.disable_jit():
        found = np.asarray(module.apply({"params": params}, small))
    expected = np.asarray(jax.image.resize(small, (1, 64, 64, 3), "linear"))
    inner = np.abs(found - expected)[:, 8:-8, 8:-8]
    assert inner.mean() < 0.1


def test_the_loss_is_the_absolute_error():
    module = RRDBNet(SMALL)
    stage = super_resolution_stage(module)
    params = {"upscaler": init_network(module, jax.random.key(0))}
    batch = {"image": np.stack([image(32)]), "hint": np.stack([image(8)])}
    value, metrics = jax.jit(stage.loss)(params, batch, None)
    x = np.asarray(module.apply({"params": params["upscaler"]}, batch["hint"] / np.float32(255)))
    error = x - batch["image"] / 255
    assert float(value) == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert float(metrics["psnr"]) == pytest.approx(-10 * np.log10((error**2).mean()), rel=1e-4)


@pytest.fixture
def data(tmp_path):
    """Captioned images to learn and some set aside, and photographs without captions."""
    for split, count in (("train", 4), ("heldout_subjects", 2), ("photographs", 3)):
        folder = tmp_path / ("photographs" if split == "photographs" else f"data/{split}")
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(image(32, seed=10 * count + i)).save(folder / f"{i}.png")
        if split != "photographs":
            lines = [json.dumps({"file_name": f"{i}.png", "text": "a house", "source": "noto"}) for i in range(count)]
            (folder / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def command(data, workdir, steps):
    return [
        CONFIG, f"--workdir={workdir}", f"--config.data.path={data}/data", "--config.data.threads=1",
        f"--config.super_resolution.photographs={data}/photographs", "--config.super_resolution.num_block=1",
        "--config.super_resolution.num_feat=8", "--config.super_resolution.num_grow_ch=4", f"--config.steps={steps}",
        "--config.batch_size=2", "--config.data.image_size=32", "--config.crop=16", "--config.eval.images=2",
        "--config.warmup_steps=0", "--config.schedule=constant", "--config.log_every=1", "--config.eval_every=2",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_and_exports_what_opens(train_cli, data, tmp_path):
    """Stopped after a step or not, the same network comes out."""
    outs = {}
    for name, steps in {"whole": (2,), "parts": (1, 2)}.items():
        for count in steps:
            code, out, err = train_cli(*command(data, tmp_path / name, count))
            assert code == 0, err
        outs[name] = out
    assert "goes on from step 1" in outs["parts"]
    (module, whole), (_, parts) = (jaxdiff.load_upscaler(tmp_path / name / "export") for name in outs)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert module.config.scale == 4
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_psnr" in line]
    assert [line["step"] for line in evaluated] == [0, 2]
    assert evaluated[0]["eval_psnr_bicubic"] == evaluated[1]["eval_psnr_bicubic"] > 10
    assert evaluated[0]["eval_psnr"] != evaluated[1]["eval_psnr"]
    assert read_image(tmp_path / "whole" / "samples" / "step-000002.png").shape == (32, 6 * 34 - 2, 3)


def test_it_is_planned(train_cli, data, tmp_path):
    code, out, err = train_cli(*command(data, tmp_path, 2), "--plan=quick")
    assert code == 0, err
    assert "upscaler" in out
    assert "all but activations" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--config.crop=18",), "config.crop 18 must be a multiple of 4"),
        (("--config.data.image_size=30",), "config.data.image_size 30 must be a multiple of 4"),
        (("--config.crop=64",), "config.crop 64 must be at most data.image_size"),
        (("--config.super_resolution.scale=3",), "config.super_resolution.scale 3 must be one of 2, 4, 8, 16"),
        (("--config.init_from.model=icons",), "config.init_from.model means nothing to the stage super_resolution"),
        (("--config.init_from.upscaler=none.pth",), "init_from.upscaler: none.pth is neither a file"),
        (("--config.cache_latents=1",), "the stage super_resolution does not read this"),
        (("--config.super_resolution.jpeg=0",), "super_resolution.jpeg"),
        (("--precompute",), "learns from images, not latents"),
    ],
)
def test_mistakes_are_named(train_cli, data, tmp_path, more, said):
    code, _, err = train_cli(*command(data, tmp_path / "run", 2), *more)
    assert code in (1, 2)
    assert said in err
    assert not (tmp_path / "run" / "export").exists()


def test_settings_of_this_stage_are_refused_in_others(train_cli, data, tmp_path):
    args = [f"--config={ROOT}/configs/icons/vae.py:cpu", f"--config.data.path={data}/data", f"--workdir={tmp_path}/run"]
    code, _, err = train_cli(*args, f"--config.super_resolution.photographs={data}/photographs")
    assert (code, "the stage vae does not read this" in err) == (2, True)


def test_a_network_of_a_file_is_gone_on_from(tmp_path):
    module = RRDBNet(SMALL)
    params = init_network(module, jax.random.key(5))
    jaxdiff.save_upscaler(tmp_path / "net.safetensors", params)
    config = config_of(init_from={"upscaler": str(tmp_path / "net.safetensors")})
    assert network_config(config) == module.config
    jax.tree.map(np.testing.assert_array_equal, make(config).params["upscaler"], params)


@pytest.mark.parametrize("scale", sizes.SCALES)
def test_the_config_can_be(scale):
    config = importlib.import_module("configs.upscaler.x4").get_config(scale)
    check_settings(config)
    Options.from_config(config).check(1)
    assert make(config, shapes_only=True).upscaler.config.scale == 4
