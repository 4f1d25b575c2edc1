"""One-file checkpoints: there and back, foreign ones, and one clear sentence for every bad file."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.configs import replace_config
from jaxdiff.io.infer_config import infer_configs, scheduler_config
from jaxdiff.io.modules import save_module
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX
from jaxdiff.io.pretrained import load, save
from jaxdiff.io.single_file import _metadata, load_single_file, save_single_file
from jaxdiff.io.tensor_files import open_tensors
from jaxdiff.io.vae import load_vae
from tests.support import tiny
from tests.support.published import BESIDE, small_model, tensors_of
from tests.support.tiny import tiny_params

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")


@pytest.fixture(scope="module", params=FAMILIES)
def small(request, tmp_path_factory):
    """(family, model, params, its file) of each family."""
    model = small_model(request.param)
    params = tiny.tiny_params(model)
    path = tmp_path_factory.mktemp("one") / "model.safetensors"
    save_single_file(path, model, params)
    return request.param, model, params, path


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.slow
def test_what_is_saved_comes_back(small, tmp_path):
    family, model, params, path = small
    assert model.family == family
    reopened, loaded = load_single_file(path)
    assert reopened == model
    assert_equal(loaded, params)
    save_single_file(tmp_path / "again.safetensors", reopened, loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def untold(model) -> dict[str, dict]:
    """What no tensor of a small model tells."""
    fields = ("num_attention_heads", "eos_token_id", "bos_token_id", "pad_token_id", "projection_dim")
    texts = {name: module.config for name, module in model.modules.items() if name.startswith("text_encoder")}
    return {name: {f: getattr(config, f) for f in fields} for name, config in texts.items()} | {
        "unet": {"attention_head_dim": 2, "norm_num_groups": 4},
        "vae": {"norm_num_groups": 4, "sample_size": tiny.SIDE},
    }


@pytest.mark.slow
def test_a_foreign_file_of_the_same_tensors(small, tmp_path):
    """Without our metadata, sizes come from the shapes, and the caller says what no shape tells."""
    family, model, params, path = small
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(path) | {name: np.zeros(shape, np.float32) for name, shape in BESIDE.items()}, foreign)
    reopened, loaded = load_single_file(foreign, configs=untold(model))
    assert_equal(loaded, params)
    assert reopened.modules == model.modules
    assert (reopened.scheduler, reopened.options, reopened.family) == (model.scheduler, model.options, family)


@pytest.mark.slow
def test_sd_turbo_has_the_layout_of_sdxl(tmp_path):
    """An SD 2.1 whose text encoder stands where the SDXL refiner has its own: the file reads as the folder does."""
    model = replace_config(small_model("sd2"), "unet", sample_size=64)
    model = dataclasses.replace(model, scheduler=scheduler_config("turbo"))
    params = tiny.tiny_params(model)
    save(tmp_path / "folder", model, params)
    moved = {
        n.replace("cond_stage_model.", "conditioner.embedders.0."): x for n, x in tensors_of(model, params).items()
    }
    text = "conditioner.embedders.0.model."
    beside = {f"{text}text_projection": [16, 16], f"{text}logit_scale": [], "denoiser.sigmas": [1000]}
    assert any(n.startswith(text) for n in moved)
    save_file(moved | {n: np.zeros(shape, np.float32) for n, shape in beside.items()}, tmp_path / "turbo.safetensors")
    reopened, loaded = load_single_file(tmp_path / "turbo.safetensors", configs=untold(model))
    folder, expected = load(tmp_path / "folder")
    assert_equal(loaded, expected)
    assert (reopened.modules, reopened.scheduler) == (folder.modules, folder.scheduler)
    assert (reopened.family, reopened.options) == ("sd2", folder.options)
    said = reopened.scheduler
    assert (said.class_name, said.timestep_spacing, said.prediction_type) == (
        "EulerDiscreteScheduler",
        "trailing",
        "epsilon",
    )


def test_a_distilled_model_there_and_back(tmp_path):
    """With the guidance embedding under a name of our own, and without our metadata with LCM's scheduler."""
    model = replace_config(tiny.tiny_model(), "unet", time_cond_proj_dim=16)
    model = dataclasses.replace(model, scheduler=scheduler_config("lcm"))
    params = tiny.tiny_params(model)
    save_single_file(tmp_path / "lcm.safetensors", model, params)
    again, loaded = load_single_file(tmp_path / "lcm.safetensors")
    assert again == model
    assert_equal(loaded, params)
    found = infer_configs(open_tensors(tmp_path / "lcm.safetensors"), "sd1")
    assert (found["scheduler"], found["unet"].time_cond_proj_dim) == (model.scheduler, 16)


@pytest.mark.slow
def test_a_unet_without_a_middle_block_there_and_back(tmp_path):
    """With our metadata and without; the folder of it says null, which is not the default."""
    model = replace_config(small_model("sd1"), "unet", mid_block_type=None)
    params = tiny.tiny_params(model)
    assert "mid_block" not in params["unet"]
    save_single_file(tmp_path / "ours.safetensors", model, params)
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "foreign.safetensors")
    save(tmp_path / "folder", model, params)
    for again, loaded in (
        load_single_file(tmp_path / "ours.safetensors"),
        load_single_file(tmp_path / "foreign.safetensors", configs=untold(model)),
        load(tmp_path / "folder"),
    ):
        assert again.unet == model.unet
        assert_equal(loaded, params)


@pytest.mark.slow
@pytest.mark.parametrize("zero_snr", [False, True])
def test_sdxl_of_v_prediction_bears_its_marks(zero_snr, tmp_path):
    """Tensors without numbers, by which other programs know it."""
    model = small_model("sdxl")
    model = dataclasses.replace(model, scheduler=scheduler_config("sdxl", "v_prediction", zero_snr=zero_snr))
    path = tmp_path / "x.safetensors"
    save_single_file(path, model, tiny.tiny_params(model))
    marks = {name: x for name, x in load_file(path).items() if "." not in name}
    assert {name: x.size for name, x in marks.items()} == {"v_pred": 0} | ({"ztsnr": 0} if zero_snr else {})
    assert load_single_file(path)[0] == model
    assert infer_configs(open_tensors(path), "sdxl")["scheduler"] == model.scheduler


@pytest.mark.slow
def test_prediction_type_is_overridden(small):
    _, model, _, path = small
    assert load_single_file(path, prediction_type="epsilon")[0].scheduler == dataclasses.replace(
        model.scheduler, prediction_type="epsilon"
    )


@pytest.fixture
def tensors(tiny):
    return tensors_of(*tiny)


@pytest.fixture
def write(tiny, tmp_path):
    """Writes tensors as a file of the tiny model and returns its path."""

    def write(tensors, metadata=None):
        own = json.dumps(_metadata(tiny[0]))
        save_file(tensors, tmp_path / "x.safetensors", metadata={"jaxdiff": own if metadata is None else metadata})
        return tmp_path / "x.safetensors"

    return write


def test_a_missing_tensor_is_named(tensors, write):
    name = f"{VAE_PREFIX}decoder.mid.attn_1.k.bias"
    del tensors[name]
    with pytest.raises(WeightsError, match=rf"x\.safetensors lacks the tensor {re.escape(name)}: "):
        load_single_file(write(tensors))


def test_an_unknown_tensor_is_named(tensors, write):
    name = f"{UNET_PREFIX}input_blocks.9.7.weight"
    with pytest.raises(WeightsError, match=f"holds 1 tensors .* no place for, first {re.escape(name)}"):
        load_single_file(write(tensors | {name: np.zeros(2)}))


def test_a_tensor_of_another_shape_is_named(tensors, write):
    tensors[f"{UNET_PREFIX}out.0.bias"] = np.zeros(5, np.float32)
    with pytest.raises(WeightsError, match=r"conv_norm_out\.bias has shape \[5\]"):
        load_single_file(write(tensors))


def test_a_unet_alone_is_no_checkpoint(tensors, tmp_path):
    save_file({n: x for n, x in tensors.items() if n.startswith(UNET_PREFIX)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"has no text encoder of .* and no autoencoder: it was pruned"):
        load_single_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ("lora_unet_conv_in.alpha", "holds a LoRA: load a model, then give the file to jaxdiff.load_lora"),
        (f"{VAE_PREFIX}encoder.conv_in.weight", "holds an autoencoder alone: .* give the file to jaxdiff.load_vae"),
        ("encoder.conv_in.weight", "holds an autoencoder alone"),
        ("control_model.input_hint_block.0.weight", "holds a ControlNet: give it to jaxdiff.load_controlnet"),
        ("down_blocks.0.resnets.0.conv1.weight", "holds a UNet of a diffusers folder"),
        ("something.else", r"lacks the tensor .*input_blocks\.0\.0\.weight: is it a whole Stable Diffusion checkpoint"),
    ],
)
def test_what_is_no_whole_checkpoint_is_named(tensor, sentence, tmp_path):
    save_file({tensor: np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=sentence):
        load_single_file(tmp_path / "x.safetensors")


def test_a_checkpoint_without_autoencoder_is_named(tensors, write):
    with pytest.raises(WeightsError, match=r"has no autoencoder \(first_stage_model\.…\): it was pruned"):
        load_single_file(write({n: x for n, x in tensors.items() if not n.startswith(VAE_PREFIX)}))


@pytest.mark.slow
def test_another_autoencoder_takes_the_models_place(tiny, tensors, tmp_path):
    """One-file checkpoints' autoencoders, alone or in a whole file, and a folder; the model's scale stays."""
    model, params = tiny
    other = tiny_params(model, seed=1)
    model = replace_config(model, "vae", scaling_factor=0.5)
    whole = tensors_of(model, other)
    alone = {n: x for n, x in whole.items() if n.startswith(VAE_PREFIX)}
    beside = {f"{VAE_PREFIX}loss.logvar": np.zeros(1, np.float32), "model_ema.decay": np.zeros(1, np.float32)}
    save_file(alone | beside, tmp_path / "prefix.safetensors")
    save_file({n.removeprefix(VAE_PREFIX): x for n, x in alone.items()}, tmp_path / "bare.safetensors")
    save_file(whole, tmp_path / "whole.safetensors")
    save_module(tmp_path / "folder", model.vae, other["vae"])
    for name in ("prefix.safetensors", "bare.safetensors", "whole.safetensors", "folder"):
        found, both = load_vae(model, params, tmp_path / name)
        assert found == model
        assert_equal(both, params | {"vae": other["vae"]})
    save_module(tmp_path / "half", model.vae, other["vae"], dtype="float16")
    assert {x.dtype.name for x in jax.tree.leaves(load_vae(model, params, tmp_path / "half")[1]["vae"])} == {"float32"}
    wide = json.loads((tmp_path / "folder/config.json").read_text()) | {"block_out_channels": [8, 32]}
    (tmp_path / "folder/config.json").write_text(json.dumps(wide))
    with pytest.raises(WeightsError, match=r"has shape .* calls for"):
        load_vae(model, params, tmp_path / "folder")
    narrow = replace_config(model, "vae", latent_channels=8)
    with pytest.raises(
        ConfigError, match=r"half has 4 latent channels, each of 2 pixels, the model 8 of 2: take an aut"
    ):
        load_vae(narrow, params, tmp_path / "half")
    del alone[f"{VAE_PREFIX}decoder.mid.attn_1.k.bias"]
    save_file(alone, tmp_path / "prefix.safetensors")
    with pytest.raises(WeightsError, match=r"lacks the tensor first_stage_model\.decoder\.mid\.attn_1\.k\.bias"):
        load_vae(model, params, tmp_path / "prefix.safetensors")
    with pytest.raises(ConfigError, match="nothing does not exist"):
        load_vae(model, params, tmp_path / "nothing")


@pytest.mark.parametrize(
    "metadata", ["[]", "{", "{}", '{"unet": 3}', '{"options": {}, "unet": {"block_out_channels": 3}}']
)
def test_damaged_metadata(metadata, tensors, write):
    with pytest.raises(ConfigError, match=r"config.* of .*x\.safetensors"):
        load_single_file(write(tensors, metadata))


def test_it_is_written_whole_or_not_at_all(tiny, tmp_path):
    with pytest.raises(WeightsError, match=r"does not end in \.safetensors"):
        save_single_file(tmp_path / "x.ckpt", *tiny)
    with pytest.raises(WeightsError, match="cannot be written"):
        save_single_file(tmp_path / "none" / "x.safetensors", *tiny)
    assert not list(tmp_path.iterdir())


def test_a_pickled_checkpoint_in_half_precision(tiny, tensors, tmp_path):
    torch = pytest.importorskip("torch")
    state = {n: torch.from_numpy(x).half() for n, x in tensors.items()}
    torch.save({"state_dict": state, "global_step": 7, "epoch": 0}, tmp_path / "x.ckpt")
    model, _ = tiny
    text = model.text_encoder.config
    _, params = load_single_file(
        tmp_path / "x.ckpt",
        configs={
            "unet": {"attention_head_dim": 2, "norm_num_groups": 4},
            "vae": {"norm_num_groups": 4},
            "text_encoder": {"num_attention_heads": 2, "eos_token_id": text.eos_token_id},
        },
    )
    assert_equal(params, jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), tiny[1]))
