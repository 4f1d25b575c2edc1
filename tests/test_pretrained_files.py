"""The files of a model's folder: one clear sentence for every bad one, older ones read, none lost in saving."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.config import ConfigError
from jaxdiff.diffusion.times import default_scheduler
from jaxdiff.errors import WeightsError
from jaxdiff.io.diffusers_folder import load_model
from jaxdiff.io.pretrained import load, save
from jaxdiff.sampling.resolve import latent_shape
from tests.support.comparison import assert_equal
from tests.support.tiny import MAX_LENGTH
from tests.support.written import files

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


MISSING = (
    "model_index.json",
    "unet/config.json",
    UNET_WEIGHTS,
    "scheduler/scheduler_config.json",
    "vae/diffusion_pytorch_model.safetensors",
    TEXT_WEIGHTS,
)


@pytest.mark.parametrize("name", MISSING)
def test_missing_files_are_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: is the folder a complete diffusers folder"):
        load(folder)


def test_missing_tokenizer_is_named(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ConfigError, match="tokenizer holds no CLIP vocabulary"):
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 200, -10])
def test_truncated_weights_are_named(size, folder):
    path = folder / UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=f"{UNET_WEIGHTS} is damaged or not a safetensors file"):
        load(folder)


@pytest.mark.parametrize("text", ["", '{"sample_size": 8', "[8]", "\x00\xff"])
def test_broken_json_is_named(text, folder):
    (folder / "unet" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"unet/config\.json (cannot be read as JSON|holds list, not a JSON object)"):
        load(folder)


def test_weights_of_another_model_name_the_first_tensor_and_both_shapes(folder):
    config = json.loads((folder / "unet/config.json").read_text()) | {"cross_attention_dim": 20}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(
        WeightsError, match=r"tensor \S+attn2\.to_k\.weight has shape \[16, 16\], .* calls for \[16, 20\]"
    ):
        load(folder)


def test_missing_tensor_is_named(folder):
    edit_tensors(folder / UNET_WEIGHTS, lambda t: t.pop("conv_in.weight"))
    with pytest.raises(WeightsError, match=rf"{UNET_WEIGHTS} lacks the tensor conv_in\.weight"):
        load(folder)


def test_extra_tensor_is_named(folder):
    edit_tensors(folder / UNET_WEIGHTS, lambda t: t.update({"lora.down": np.ones(3, np.float32)}))
    with pytest.raises(WeightsError, match=r"holds 1 tensors that its config\.json has no place for, first lora\.down"):
        load(folder)


def test_buffers_and_prefixes_of_older_files_are_understood(tiny, folder):
    """transformers 4 wrote `text_model.` before every name, and the positions as if they were a weight."""

    def age(tensors):
        for name in list(tensors):
            tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = np.arange(MAX_LENGTH)[None]

    edit_tensors(folder / TEXT_WEIGHTS, age)
    assert_equal(load(folder)[1], tiny[1])


def test_configs_that_make_no_model(folder):
    config = json.loads((folder / "unet/config.json").read_text()) | {"norm_num_groups": 7}
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"the configs in .* do not make a model"):
        load(folder)


def test_schedulers_of_flax_are_those_of_pytorch(tiny, folder):
    """Folders of the former Flax models name their own classes, which PyTorch diffusers no longer has."""
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FlaxPNDMScheduler"}))
    model, params = load(folder)
    assert model.scheduler == dataclasses.replace(tiny[0].scheduler, class_name="PNDMScheduler")
    assert default_scheduler(model.scheduler) == "pndm"
    save(folder, model, params)
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]


def test_unknown_block_is_named(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    config["down_block_types"][0] = "KDownBlock2D"
    (folder / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'KDownBlock2D'; known are"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        (
            "vae",
            {"_class_name": "AsymmetricAutoencoderKL"},
            "describes a AsymmetricAutoencoderKL, but AutoencoderKL or AutoencoderTiny or AutoencoderKLFlux2 is needed",
        ),
        (
            "vae",
            {"latents_mean": [0.1] * 4},
            r"AutoencoderKL's config says latents_mean: \[0.1, 0.1, 0.1, 0.1\], which",
        ),
        (
            "unet",
            {"_class_name": "UNetMotionModel"},
            r"unet/config\.json describes a UNetMotionModel, but UNet2DConditionModel or TextConditionalGenerator is",
        ),
        (
            "unet",
            {"time_embedding_type": "fourier"},
            "config says time_embedding_type: 'fourier', which is not supported",
        ),
        ("unet", {"resnet_out_scale_factor": 1.4}, "config says resnet_out_scale_factor: 1.4, which is not supported"),
        ("unet", {"encoder_hid_dim_type": "image_proj"}, "config says encoder_hid_dim_type: 'image_proj', which"),
        ("unet", {"addition_embed_type": "image"}, "says addition_embed_type: 'image'; known are None, 'text_time'"),
        ("unet", {"addition_embed_type": "text_time"}, "says addition_embed_type: 'text_time' but not addition_time_e"),
        (
            "unet",
            {"class_embed_type": []},
            r"says class_embed_type: \[\]; known are None, 'timestep', 'identity', 'proj",
        ),
        ("unet", {"class_embed_type": "projection"}, "but not projection_class_embeddings_input_dim"),
        ("unet", {"cross_attention_dim": [16, 24]}, r"says cross_attention_dim: \[16, 24\]; one width for all levels"),
        (
            "unet",
            {"attention_head_dim": [5, 10]},
            r"unet/config\.json .* says attention_head_dim: \[5, 10\], but block_out_channels has length 1: give",
        ),
        ("unet", {"layers_per_block": [1, 1]}, r"unet/config\.json .* says layers_per_block: \[1, 1\], but"),
        (
            "unet",
            {"cross_attention_dim": [[16], [16]]},
            r"unet/config\.json does not describe a UNet2DConditionModel \(T",
        ),
        (
            "unet",
            {"act_fn": "mish"},
            r"unet/config\.json does not describe .*: act_fn 'mish' is unknown; known are silu",
        ),
        ("vae", {"act_fn": 3}, r"vae/config\.json does not describe a AutoencoderKL: act_fn is 3 and must be a text"),
        ("text_encoder", {"hidden_act": "mish"}, r"text_encoder/config\.json .*: hidden_act 'mish' is unknown"),
        (
            "text_encoder",
            {"model_type": "roberta_series"},
            "config.json describes a roberta_series, but CLIPTextModel or Qwen3ForCausalLM is needed",
        ),
    ],
)
def test_what_is_not_built_is_named(part, change, sentence, folder):
    config = json.loads((folder / part / "config.json").read_text()) | change
    (folder / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=sentence):
        load_model(folder)


def test_lists_in_configs_are_honoured(folder):
    path = folder / "unet/config.json"
    config = json.loads(path.read_text())
    changes = {"sample_size": [8, 12], "cross_attention_dim": [16], "attention_head_dim": [2], "encoder_hid_dim": None}
    path.write_text(json.dumps(config | changes | {"resnet_out_scale_factor": 1.0}))
    model = load_model(folder)
    assert latent_shape(model, None, None) == (8, 12, 4)
    assert model.unet.config.side == 8
    assert (model.unet.config.cross_attention_dim, model.unet.config.heads) == (16, (2,))


def test_save_replaces_a_model_and_keeps_what_is_no_part_of_it(tiny, folder):
    model, params = tiny
    (folder / "README.md").write_text("a model card")
    (folder / "unet" / "leftover.safetensors").write_text("of the model before")
    names = sorted(files(folder))
    save(folder, model, jax.tree.map(lambda x: 2 * x, params))
    names.remove("unet/leftover.safetensors")
    assert sorted(files(folder)) == names
    assert (folder / "README.md").read_text() == "a model card"
    assert_equal(load(folder)[1], jax.tree.map(lambda x: 2 * x, params))
    assert os.listdir(folder.parent) == [folder.name]


def test_a_save_that_fails_at_the_last_moment_loses_nothing(tiny, folder, monkeypatch):
    model, params = tiny
    (folder / "README.md").write_text("a model card")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WeightsError, match="No space left on device"):
        save(folder, model, params)
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert os.listdir(folder.parent) == [folder.name]


def test_a_failed_save_keeps_the_old_model(tiny, folder, monkeypatch):
    before = files(folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxdiff.io.tensor_files.save_file", full)
    with pytest.raises(WeightsError, match=r"cannot be written \(No space left on device\)"):
        save(folder, *tiny)
    assert files(folder) == before
    assert os.listdir(folder.parent) == [folder.name]
