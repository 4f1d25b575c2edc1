"""Sizes of images that a stage cannot train on are refused in one sentence, before weights are read."""

import jax
import numpy as np
import pytest

from jaxdiff.config import CLIPVisionConfig, VAEConfig
from jaxdiff.models.model import param_shapes
from jaxdiff.training import init
from jaxdiff.training.checks import check_memory, check_sizes
from jaxdiff.training.options import OptionsError
from jaxdiff.training.run import build_run
from tests.support.image_datasets import write_folder
from tests.support.processes import CONFIG
from tests.support.tiny import SIDE, tiny_model
from tests.support.training_config import get_config

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def settings(stage="vae", **data):
    config = get_config(stage)
    for name, value in data.items():
        (config if name == "crop" else config.data)[name] = value
    return config


@pytest.mark.parametrize("crop", [14, 15, 18, 4, -8, SIDE + 4])
def test_a_crop_that_does_not_fit(crop):
    with pytest.raises(OptionsError, match=rf"crop {crop} must be from 8 to 16, and a multiple of 4"):
        check_sizes(settings(crop=crop), tiny_model())


@pytest.mark.parametrize("crop", [0, 8, 12, SIDE])
def test_a_crop_that_fits(crop):
    check_sizes(settings(crop=crop), tiny_model())


def test_the_factor_counts_where_it_is_larger_than_the_scales():
    deep = {"block_out_channels": (8,) * 5, "down_block_types": ("DownEncoderBlock2D",) * 5}
    vae = VAEConfig(**deep, up_block_types=("UpDecoderBlock2D",) * 5, norm_num_groups=4)
    model = tiny_model()
    model = init.build(model.text_encoder.config, model.unet.config, vae, model.tokenizer, model.scheduler)
    check_sizes(settings(image_size=64, crop=32), model)
    with pytest.raises(OptionsError, match=r"crop 24 must be from 16 to 64, and a multiple of 16"):
        check_sizes(settings(image_size=64, crop=24), model)


@pytest.mark.parametrize(
    ("stage", "data", "said"),
    [
        ("vae", {"image_size": 18}, "data.image_size 18 must be at least 8, and a multiple of 4"),
        ("vae", {"image_size": 15, "crop": 8}, "data.image_size 15 must be at least 8, and a multiple of 2"),
        ("vae", {"image_size": 16, "buckets": 6}, "data.buckets 6 must be a multiple of 4"),
        ("unet", {"image_size": 15}, "data.image_size 15 must be at least 2, and a multiple of 2"),
        ("inpainting", {"image_size": 16, "buckets": 3}, "data.buckets 3 must be a multiple of 2"),
    ],
)
def test_sizes_and_buckets_that_do_not_fit(stage, data, said):
    with pytest.raises(OptionsError) as error:
        check_sizes(settings(stage, **data), tiny_model())
    assert said in str(error.value)


def test_what_reads_no_images_at_that_size_takes_any():
    check_sizes(settings("clip", image_size=15), tiny_model())
    config = settings("unet", image_size=15)
    config.latents.path = "latents"
    check_sizes(config, tiny_model())


def test_train_and_plan_end_before_weights_are_read(train_cli, tiny_folder, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", 2)
    monkeypatch.setattr(init, "load", lambda *a, **k: pytest.fail("weights are read"))
    args = [f"--config={CONFIG}:vae", f"--config.data.path={data}", f"--config.init_from.model={tiny_folder}"]
    for more in ((f"--workdir={tmp_path}/run",), ("--plan=quick",)):
        code, _, err = train_cli(*args, *more, "--config.crop=14")
        assert code == 2, err
        assert err.startswith("train.py: error: config.crop 14 must be from 8 to 16")
        assert err.count("\n") == 1
    code, _, err = train_cli(*args, f"--workdir={tmp_path}/run", "--config.eval.images=-1")
    assert (code, err) == (2, "train.py: error: config.eval.images -1 must be from 0 to 2147483647.\n")


def test_sizes_that_cannot_fit_into_memory_are_refused_before_weights_are_read(
    train_cli, tiny_folder, tmp_path, monkeypatch
):
    data = write_folder(tmp_path / "data", 2)
    monkeypatch.setattr(init, "load", lambda *a, **k: pytest.fail("weights are read"))
    args = [f"--config={CONFIG}:unet", f"--config.data.path={data}", f"--config.init_from.model={tiny_folder}"]
    large = ["--config.data.image_size=16384", "--config.batch_size=100000"]
    code, _, err = train_cli(*args, *large, f"--workdir={tmp_path}/run")
    assert code == 2, err
    assert "train.py: error: config.data.image_size 16384: 100000 images a device take at least" in err
    assert not (tmp_path / "run").exists()
    config = settings("unet", image_size=16384)
    config.batch_size = config.accumulate = 100_000
    check_memory(config, tiny_model(), 1)  # one at a time


@pytest.mark.parametrize("stage", ["vae", "clip", "inpainting"])
def test_no_images_to_evaluate_on(tmp_path, stage, monkeypatch):
    """Training goes without evaluation; so does one that draws from images set aside."""
    config = get_config(stage)
    first = tiny_model()
    parts = first.text_encoder.config, first.unet.config, first.vae.config, first.tokenizer, first.scheduler
    model = init.build(*parts, CLIPVisionConfig.from_dict(config.model.vision_encoder.to_dict()))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(model))
    monkeypatch.setattr(init, "starting_model", lambda *args, **kwargs: (model, params))
    config.data.path, config.eval.images = str(write_folder(tmp_path / "data", 4)), 0
    config.data.eval_split = "" if stage == "clip" else "train"
    config.eval.prompts = ("a castle",)
    on_eval = build_run(config, tmp_path).on_eval()
    assert on_eval is None or on_eval(0, {}) == {}
