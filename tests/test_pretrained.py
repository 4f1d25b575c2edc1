"""Diffusers folders in and out: round trips, PyTorch's side of them, and one clear sentence for every bad file."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.arguments import latent_shape
from jaxdiff.config import ConfigError
from jaxdiff.diffusion.times import default_scheduler
from jaxdiff.io.pretrained import load, load_model, replace_config, save
from jaxdiff.io.weights import WeightsError
from tests.tiny import LATENT, MAX_LENGTH, tiny_params

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_load_returns_what_was_saved(tiny, tiny_folder):
    model, params = load(tiny_folder)
    assert model == tiny[0]
    assert hash(model) == hash(tiny[0])
    assert_equal(params, tiny[1])


def test_saving_again_gives_the_same_bytes(tiny_folder, tmp_path):
    save(tmp_path / "again", *load(tiny_folder))
    assert files(tmp_path / "again") == files(tiny_folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tiny, tiny_folder, tmp_path):
    """Loaded in half precision, or saved in it, parameters are those of the file, rounded once."""
    expected = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), tiny[1])
    model, params = load(tiny_folder, dtype=dtype)
    assert model.unet.dtype == jnp.dtype(dtype)
    assert_equal(params, expected)
    save(tmp_path / "half", *tiny, dtype=dtype)
    reopened = load(tmp_path / "half")[1]
    assert {x.dtype for x in jax.tree.leaves(reopened)} == {jnp.dtype("float32")}
    assert_equal(reopened, jax.tree.map(lambda x: x.astype(np.float32), expected))


def test_unknown_dtype_lists_the_known(tiny_folder):
    with pytest.raises(ConfigError, match=r"'int8' is unknown; known are float32, bfloat16, float16"):
        load(tiny_folder, dtype="int8")


def test_unknown_model_names_what_there_is():
    with pytest.raises(ConfigError, match=r"no-such-model is no folder and no bundled model \(bundled: "):
        load("no-such-model")


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
    with pytest.raises(WeightsError, match=f"{UNET_WEIGHTS} is damaged or no safetensors file"):
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


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        (
            8,
            r"has a UNet that takes 8 channels, as InstructPix2Pix does; models of 4 for text to image, 9 for inp",
        ),
        (5, r"has a UNet that takes 5 channels, as depth-to-image models do; "),
        (6, r"has a UNet that takes 6 channels; models of .*, 7 for upscaling are drawn with: choose"),
    ],
)
def test_what_cannot_be_drawn_is_refused(channels, sentence, tiny, tmp_path):
    """Once opened, it would end in an error of the network's first layer."""
    model = replace_config(tiny[0], "unet", in_channels=channels)
    for name in ("folder", "x.safetensors"):
        save(tmp_path / name, model, tiny_params(model))
        with pytest.raises(ConfigError, match=rf"{name} {sentence}"):
            load(tmp_path / name)


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
            "describes a AsymmetricAutoencoderKL, but AutoencoderKL or AutoencoderTiny is needed: choose a",
        ),
        (
            "vae",
            {"latents_mean": [0.1] * 4},
            r"AutoencoderKL's config says latents_mean: \[0.1, 0.1, 0.1, 0.1\], which",
        ),
        (
            "unet",
            {"_class_name": "UNetMotionModel"},
            r"unet/config\.json describes a UNetMotionModel, but UNet2DConditionModel is needed",
        ),
        ("unet", {"time_embedding_type": "fourier"}, "config says time_embedding_type: 'fourier', which is not built"),
        ("unet", {"resnet_out_scale_factor": 1.4}, "config says resnet_out_scale_factor: 1.4, which is not built here"),
        ("unet", {"encoder_hid_dim_type": "image_proj"}, "config says encoder_hid_dim_type: 'image_proj', which"),
        ("unet", {"addition_embed_type": "image"}, "says addition_embed_type: 'image'; known are None, 'text_time'"),
        ("unet", {"addition_embed_type": "text_time"}, "says addition_embed_type: 'text_time' but not addition_time_e"),
        (
            "unet",
            {"class_embed_type": []},
            r"says class_embed_type: \[\]; known are None, 'timestep', 'identity', 'proj",
        ),
        ("unet", {"class_embed_type": "projection"}, "but not projection_class_embeddings_input_dim"),
        ("unet", {"cross_attention_dim": [16, 24]}, r"says cross_attention_dim: \[16, 24\]; known is one width"),
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
        ("vae", {"act_fn": 3}, r"vae/config\.json does not describe a AutoencoderKL: act_fn 3 is unknown"),
        ("text_encoder", {"hidden_act": "mish"}, r"text_encoder/config\.json .*: hidden_act 'mish' is unknown"),
        (
            "text_encoder",
            {"model_type": "roberta_series"},
            "config.json describes a roberta_series, but CLIPTextModel is needed",
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


def test_save_refuses_a_folder_of_something_else(tiny, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"dear")
    with pytest.raises(WeightsError, match="photos exists and is no model's folder"):
        save(tmp_path / "photos", *tiny)
    with pytest.raises(WeightsError, match=r"cat\.png exists and is no model's folder"):
        save(tmp_path / "photos" / "cat.png", *tiny)
    assert files(tmp_path) == {"photos/cat.png": b"dear"}


def test_a_failed_save_keeps_the_old_model(tiny, folder, monkeypatch):
    before = files(folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxdiff.io.weights.save_file", full)
    with pytest.raises(WeightsError, match=r"cannot be written \(No space left on device\)"):
        save(folder, *tiny)
    assert files(folder) == before
    assert os.listdir(folder.parent) == [folder.name]


def test_save_below_a_file_is_one_sentence(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written"):
        save(tmp_path / "file" / "model", *tiny)


# PyTorch's side. Both draw float32 pictures through some hundred operations of relative error 2**-24; the scheduler's
# division by small alphas enlarges that by up to 1/alpha = 15, still far below a grey level, so that only pixels within
# rounding of a level's border may differ, by one. 2 of 255 levels are what users of a checkpoint are promised.
LEVELS = 2
PROMPTS = ["a red dragon", "a castle"]


def drawn_by_diffusers(folder, noise):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    return pipeline(
        PROMPTS,
        negative_prompt=["blurry"] * 2,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=latents,
        output_type="np",
    ).images


def drawn_by_us(folder, noise):
    from jaxdiff import generate

    return generate(*load(folder), PROMPTS, "blurry", steps=4, guidance_scale=3.0, noise=noise) / 255.0


def assert_same_pictures(ours, theirs):
    assert theirs.std() > 0.1  # pictures, not a constant or a clipped plane
    assert np.abs(ours - theirs).max() <= LEVELS / 255


def test_diffusers_opens_our_folder_and_draws_the_same(tiny_folder):
    noise = np.random.default_rng(0).standard_normal((2, *LATENT)).astype(np.float32)
    assert_same_pictures(drawn_by_us(tiny_folder, noise), drawn_by_diffusers(tiny_folder, noise))


def test_we_open_a_folder_of_diffusers_and_draw_the_same(tiny, tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests import networks, oracle

    tokenizer = tiny[0].tokenizer
    tokenizer.save(tmp_path / "tokenizer")
    ids = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    text = networks.SMALL_TEXT | ids | {"max_position_embeddings": MAX_LENGTH}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=oracle.vae("sd1"),
        text_encoder=oracle.drawn(CLIPTextModel(CLIPTextConfig(**text))),
        tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", model_max_length=MAX_LENGTH),
        unet=oracle.unet("sd2"),
        scheduler=diffusers.DDIMScheduler(**ddim_config(tiny[0].scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    noise = np.random.default_rng(0).standard_normal((2, *LATENT)).astype(np.float32)
    assert_same_pictures(drawn_by_us(tmp_path / "theirs", noise), drawn_by_diffusers(tmp_path / "theirs", noise))


def ddim_config(config):
    names = ("beta_start", "beta_end", "beta_schedule", "clip_sample", "set_alpha_to_one", "steps_offset")
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


def test_the_prediction_type_may_be_said(tiny_folder):
    assert load(tiny_folder)[0].scheduler.prediction_type == "epsilon"
    assert load(tiny_folder, prediction_type="v_prediction")[0].scheduler.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match=r"prediction_type 'v' is unknown; known are epsilon, "):
        load(tiny_folder, prediction_type="v")
