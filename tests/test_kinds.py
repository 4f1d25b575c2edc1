"""Checkpoints with more or less than a model, and files and folders of models that are not drawn."""

import argparse
import collections
import datetime
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io.diffusers_folder import load_model, read_index
from jaxdiff.io.infer_config import detect
from jaxdiff.io.kinds import DRAWN_FROM_FOLDERS
from jaxdiff.io.model_paths import BUNDLED, find
from jaxdiff.io.modules import save_module
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX
from jaxdiff.io.pretrained import load, save
from jaxdiff.io.single_file import _metadata, load_single_file
from jaxdiff.io.tensor_files import open_tensors
from jaxdiff.io.upscaler import find_upscaler
from tests.support.comparison import assert_equal
from tests.support.published import tensors_of

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"


@pytest.fixture(scope="module")
def tensors(tiny):
    return tensors_of(*tiny)


@pytest.fixture
def write(tiny, tmp_path):
    """Writes tensors as a checkpoint of the tiny model and returns its path."""

    def write(tensors, name="x.safetensors"):
        save_file(tensors, tmp_path / name, metadata={"jaxdiff": json.dumps(_metadata(tiny[0]))})
        return tmp_path / name

    return write


def one(name: str) -> dict[str, np.ndarray]:
    return {name: np.zeros(1, np.float32)}


STRAYS = (
    "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
    f"{UNET_PREFIX}input_blocks.1.1.proj_in.alpha",
    f"{UNET_PREFIX}middle_block.1.proj_in.lora_up.weight",
    "cond_stage_model.transformer.vision_model.post_layernorm.weight",
    "cond_stage_model.model.visual.ln_post.weight",
    "conditioner.embedders.0.model.ln_final.bias",
    "control_model.zero_convs.0.0.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
    "epoch",
    "optimizer.state.0",
)


@pytest.mark.slow
@pytest.mark.parametrize("stray", STRAYS)
def test_stray_tensors_are_passed_over_and_named(stray, tiny, tensors, write, caplog):
    with caplog.at_level(logging.WARNING):
        _, params = load_single_file(write(tensors | one(stray)))
    assert_equal(params, tiny[1])
    assert f"1 tensors that drawing does not need are passed over, such as {stray}" in caplog.text
    assert ("give the file to --controlnet too" in caplog.text) == stray.startswith("control_model")


def test_nothing_is_said_of_a_clean_checkpoint(tensors, write, caplog):
    load_single_file(write(tensors | one("alphas_cumprod")))
    assert not caplog.records


@pytest.mark.slow
def test_a_checkpoint_without_autoencoder_takes_another(tiny, tensors, write, tmp_path):
    """As a file and as a folder; without one it says how."""
    model, params = tiny
    without = {n: x for n, x in tensors.items() if not n.startswith(VAE_PREFIX)}
    save_module(tmp_path / "vae", model.vae, params["vae"])
    path = write(without)
    with pytest.raises(WeightsError, match=r"has no autoencoder .*fetch the whole file, or give .* as --vae"):
        load(path)
    found, read = load(path, vae=tmp_path / "vae")
    assert found == model
    assert_equal(read, params)
    folder = tmp_path / "folder"
    save(folder, model, params)
    (folder / "vae").rename(tmp_path / "other")
    found, read = load(folder, vae=tmp_path / "other")
    assert (found.vae, found.unet) == (model.vae, model.unet)
    assert_equal(read, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.sft", "x.SAFETENSORS", "x.Safetensors", "x.ckpt", "X.CKPT", "x.bin"])
def test_a_checkpoint_by_any_name(name, tiny, tensors, write):
    """The content of a file tells its format."""
    assert_equal(load(write(tensors, name))[1], tiny[1])


def test_what_is_saved_under_another_suffix_is_a_file(tiny, tmp_path):
    for name in ("x.sft", "x.SAFETENSORS"):
        save(tmp_path / name, *tiny)
        assert (tmp_path / name).is_file()
    with pytest.raises(WeightsError, match=r"x\.ckpt does not end in \.safetensors"):
        save(tmp_path / "x.ckpt", *tiny)


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_beside_the_weights(legacy, tmp_path):
    """As training programs leave them under numpy 1 and 2; PyTorch's file under the name of a safetensors file."""
    torch = pytest.importorskip("torch")
    beside = {"best": np.float64(0.5), "step": np.int64(3), "sizes": torch.Size([2]), "device": torch.device("cpu")}
    beside["means"] = np.arange(3.0)
    content = {"state_dict": {"a": torch.ones(2)}, **beside, "more": [{"deep": np.float32(1)}]}
    for name in ("x.ckpt", "x.safetensors"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        assert open_tensors(tmp_path / name).shapes == {"a": [2]}


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_programs_leave_beside_the_weights(legacy, tmp_path):
    """Objects of known kinds are passed over; tensors of newer types and of classes of their own are read."""
    torch = pytest.importorskip("torch")
    state = {"a": torch.nn.Buffer(torch.arange(2.0)), "b": torch.tensor([1.5, -2]).to(torch.float8_e4m3fn)}
    beside = {
        "args": argparse.Namespace(lr=1.0, path=Path("x")),
        "losses": collections.defaultdict(list, a=[1]),
        "dtype": torch.float16,
        "when": datetime.datetime(2024, 1, 1),
        "seen": frozenset([1]),
        "version": torch.torch_version.TorchVersion("2.0"),
    }
    torch.save({"state_dict": state, **beside}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    source = open_tensors(tmp_path / "x.ckpt")
    assert source.shapes == {"a": [2], "b": [2]}
    np.testing.assert_array_equal(source.read("a"), [0, 1])
    np.testing.assert_array_equal(source.read("b").astype(np.float32), [1.5, -2])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_modules(prefix, tiny, tensors, write):
    """As DistributedDataParallel and torch.compile put them before all names."""
    assert_equal(load(write({prefix + n: x for n, x in tensors.items()}))[1], tiny[1])


def test_a_variant_that_only_some_parts_have(tiny, tmp_path):
    model, params = tiny
    save(tmp_path / "m", model, params)
    path = tmp_path / "m/unet/diffusion_pytorch_model.safetensors"
    doubled = {n: 2 * x for n, x in load_file(path).items()}
    save_file(doubled, path.with_suffix(".fp16.safetensors"))
    _, read = load(tmp_path / "m", variant="fp16")
    assert_equal(read["vae"], params["vae"])
    kernel = params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(read["unet"]["conv_in"]["kernel"], 2 * kernel)
    with pytest.raises(WeightsError, match="m holds no weights of the variant 'bf16': leave it out"):
        load(tmp_path / "m", variant="bf16")


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "Stable Diffusion 3"),
        (f"{UNET_PREFIX}joint_blocks.0.x_block.mlp.fc1.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        (f"{UNET_PREFIX}double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.weight", "Flux"),
        (f"{UNET_PREFIX}input_blocks.1.0.time_stack.in_layers.0.weight", "Stable Video Diffusion"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
        ("down_blocks.1.0.channelwise.0.weight", "Stable Cascade"),
        ("double_layers.0.attn.w2q.weight", "AuraFlow"),
        ("distilled_guidance_layer.in_proj.bias", "Chroma"),
        ("blocks.0.cross_attn.q_linear.weight", "PixArt or Sana"),
        (f"{UNET_PREFIX}patchify_proj.weight", "LTX Video"),
        ("head.modulation", "Wan"),
        ("cap_embedder.0.weight", "Lumina"),
        ("cap_pad_token", "Z-Image"),
        ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "Hunyuan Video"),
        ("single_stream_modulation.lin.weight", "Flux 2"),
        ("double_stream_blocks.0.block.adaLN_modulation.1.bias", "HiDream"),
        ("edm_mean", "Playground v2.5 or CosXL"),
        ("embedder.model.visual.proj", "Stable unCLIP"),
        ("cc_projection.weight", "Stable Zero123"),
        (f"{UNET_PREFIX}out.2.weight.absmax", "a model quantised with scales of its own"),
        ("encoder_hid_proj.weight", "Kandinsky"),
        ("x_embedder.proj.weight", "a diffusion transformer"),
    ],
)
def test_checkpoints_of_other_models_are_called_what_they_are(tensor, name, tmp_path):
    """Also where Stable Diffusion's own tensors stand beside."""
    beside = one(f"{UNET_PREFIX}input_blocks.0.0.weight") | one(f"{VAE_PREFIX}encoder.conv_in.weight")
    for more in ({}, beside) if "blocks.1.0" not in tensor else (beside,):
        save_file(one(tensor) | more, tmp_path / "x.safetensors")
        why = (
            "whose tokenizers no file of weights holds: give a diffusers folder of the model as --model, and this file"
        )
        why = f", {why}" if name in DRAWN_FROM_FOLDERS else ", which is not supported: supported are"
        if tensor.startswith(f"{UNET_PREFIX}joint_blocks."):  # which is drawn where the CLIPs are beside it
            why = r" and lacks a text encoder \(text_encoders\.clip_l\.transformer\.…\): fetch the file"
        with pytest.raises(WeightsError, match=rf"safetensors is of {name}.*{why}"):
            detect(open_tensors(tmp_path / "x.safetensors"))


def test_every_file_of_other_models_that_diffusers_knows_is_refused_by_name(tmp_path):
    """The names by which PyTorch diffusers tells checkpoints, but for those of Stable Diffusion."""
    pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    ours = ("v1", "v2", "xl_base", "xl_refiner", "upscale", "inpainting", "clip", "clip_sdxl", "open_clip",
            "instruct-pix2pix", "controlnet_xl", "autoencoder-dc", "wan_vae", "open_clip_sdxl",
            "open_clip_sdxl_refiner")  # fmt: skip
    for kind, names in utils.CHECKPOINT_KEY_NAMES.items():
        if kind not in ours:
            for name in [names] if isinstance(names, str) else names:
                source = open_tensors_of(name, tmp_path)
                with pytest.raises(WeightsError, match=r"x\.safetensors (is of|holds|lacks the tensor)"):
                    detect(source)


def open_tensors_of(name, folder):
    save_file(one(name), folder / "x.safetensors")
    return open_tensors(folder / "x.safetensors")


SD = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
      "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
      "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (
            {"_class_name": "IFPipeline"},
            "holds a IFPipeline, which is not supported: supported are Stable Diffusion 1.x",
        ),
        (
            {"_class_name": "IFPipeline", **SD, "text_encoder": ["transformers", "T5EncoderModel"]},
            "holds a IFPipeline, which has a T5EncoderModel as its text_encoder, not a CLIPTextModel: supp",
        ),
        ({"_class_name": "StableDiffusionInstructPix2PixPipeline", **SD}, "InstructPix2PixPipeline, which is not sup"),
        ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "InstructPix2PixPipeline, which is not sup"),
        (
            {"_class_name": "KandinskyV22Pipeline", "unet": SD["unet"], "movq": ["diffusers", "VQModel"]},
            "holds a KandinskyV22Pipeline, which needs a movq",
        ),
        (
            {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]},
            "holds a StableDiffusion3Pipeline, which is not supported: supported are",
        ),
        ({"_class_name": "StableDiffusion3Pipeline"}, "holds a StableDiffusion3Pipeline, which is not supported"),
        ({"_class_name": "FluxPipeline"}, "holds a FluxPipeline, which is not supported"),
        (
            {"_class_name": "AnimateDiffPipeline", **SD, "motion_adapter": ["diffusers", "MotionAdapter"]},
            "motion_adap",
        ),
        (
            {"_class_name": "StableVideoDiffusionPipeline", "unet": ["diffusers", "UNetSpatioTemporalConditionModel"]},
            "has a UNetSpatioTemporalConditionModel as its unet",
        ),
        ({"_class_name": "StableDiffusionDepth2ImgPipeline", **SD}, "Depth2ImgPipeline, which is not supported"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "holds a pipeline, which has a UNet2DModel as its unet"),
        (
            {"_class_name": "StableDiffusionImageVariationPipeline", **SD, "text_encoder": [None, None]},
            "ImageVariationPipeline, which is not supported",
        ),
        (
            {"_class_name": "X", "unet": SD["unet"], "vae": SD["vae"], "image_encoder": ["transformers", "CLIP"]},
            "holds a X, which has no text encoder",
        ),
        ({"_class_name": "OnnxStableDiffusionPipeline", "unet": ["diffusers", "OnnxRuntimeModel"]}, "OnnxRuntimeModel"),
    ],
)
def test_folders_of_other_pipelines_are_called_what_they_are(index, sentence, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=sentence):
        load_model(tmp_path)


def test_pipelines_that_draw_with_the_same_parts_are_no_others(tmp_path):
    names = ["StableDiffusionPipeline", "StableDiffusionXLControlNetInpaintPipeline", "LatentConsistencyModelPipeline",
             "StableDiffusionUpscalePipeline", "StableDiffusionXLImg2ImgPipeline", "FlaxStableDiffusionPipeline",
             "StableDiffusionPanoramaPipeline", "MyPipeline", "StableDiffusionAdapterPipeline"]  # fmt: skip
    for name in names:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, **SD}))
        assert read_index(tmp_path)["_class_name"] == name


def test_folders_that_are_no_pipeline(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match=r"holds one UNet2DConditionModel, not a whole model: model_index\.json"):
        load(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "sd.safetensors")
    with pytest.raises(ConfigError, match=r"index\.json is missing: if one of the folder's files is the model, give"):
        load(tmp_path)


def test_what_is_no_model_does_not_hide_a_bundled_one(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "icons").mkdir()
    (tmp_path / "icons" / "a.svg").touch()
    assert find("icons") == BUNDLED / "icons"
    assert "icons is the bundled model; ./icons is not a model." in caplog.text
    assert find("icons/") == find("./icons") == Path("icons")
    with pytest.raises(ConfigError, match=r"icons/model_index\.json is missing"):
        load("./icons")
    (tmp_path / "icons" / "config.json").write_text('{"theme": "dark"}')  # of another program
    assert find("icons") == BUNDLED / "icons"
    assert find_upscaler("icons").parent == BUNDLED / "upscaler"
    assert "icons is the bundled upscaler; ./icons is not an upscaler." in caplog.text
    (tmp_path / "icons" / "model_index.json").touch()
    assert find("icons") == Path("icons")
    assert "icons is the folder here (./icons), not the bundled model of that name" in caplog.text


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x.bin", "x.pt", "x.sft", "x.msgpack"])
def test_pointers_of_git_lfs_and_web_pages_are_fetched_again(name, tmp_path):
    for content, sentence in (
        (LFS, "is a Git LFS pointer, not"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{name} {sentence}.*: fetch it again") as error:
            open_tensors(tmp_path / name)
        assert "trust" not in str(error.value)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_pointers_in_the_place_of_configs(name, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / name).write_bytes(LFS)
    with pytest.raises(ConfigError, match=rf"{name} is a Git LFS pointer"):
        load_model(folder)


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        (
            "scheduler/scheduler_config",
            {"num_train_timesteps": "1000"},
            "num_train_timesteps is '1000' and must be a",
        ),
        (
            "scheduler/scheduler_config",
            {"num_train_timesteps": [1000]},
            r"num_train_timesteps is \[1000\] and must be",
        ),
        ("scheduler/scheduler_config", {"beta_start": "0.1"}, "beta_start is '0.1' and must be a number"),
        ("scheduler/scheduler_config", {"beta_start": True}, "beta_start is True and must be a number"),
        ("scheduler/scheduler_config", {"thresholding": "false"}, "thresholding is 'false' and must be true or false"),
        (
            "scheduler/scheduler_config",
            {"trained_betas": {"a": 1}},
            "trained_betas is .* must be a list, each",
        ),
        ("scheduler/scheduler_config", {"prediction_type": 3}, "prediction_type is 3 and must be a text"),
        ("scheduler/scheduler_config", {"prediction_type": "v"}, "prediction_type 'v' is unknown; known are epsilon"),
        ("scheduler/scheduler_config", {"beta_schedule": "cos"}, "beta_schedule 'cos' is unknown; known are linear"),
        ("vae/config", {"scaling_factor": float("nan")}, "scaling_factor is nan and must be finite"),
        ("unet/config", {"in_channels": "4"}, "in_channels is '4' and must be a whole number"),
        ("unet/config", {"sample_size": "8"}, "sample_size is '8' and must be a whole number or a list"),
        (
            "unet/config",
            {"block_out_channels": ["16"]},
            "block_out_channels is .* must be a list, each of which",
        ),
        ("unet/config", {"use_linear_projection": "no"}, "use_linear_projection is 'no' and must be true or false"),
        ("vae/config", {"scaling_factor": "0.18"}, "scaling_factor is '0.18' and must be a number"),
        ("vae/config", {"latent_channels": 4.5}, "latent_channels is 4.5 and must be a whole number"),
        ("text_encoder/config", {"hidden_size": {"a": 1}}, "hidden_size is {'a': 1} and must be a whole number"),
        (
            "model_index",
            {"force_zeros_for_empty_prompt": "yes"},
            "force_zeros_for_empty_prompt is 'yes' and must be",
        ),
        ("model_index", {"_guidance_scale": "7"}, "_guidance_scale '7'"),
        ("model_index", {"_steps": "4"}, "_steps '4'"),
        ("model_index", {"_steps": 0}, "_steps 0"),
    ],
)
def test_values_of_another_type_are_named_with_their_file(part, change, sentence, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    path = folder / f"{part}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"{part}\.json.*{sentence}"):
        load_model(folder)


def test_null_means_the_default(tiny, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    path = folder / "scheduler/scheduler_config.json"
    values = json.loads(path.read_text()) | {"num_train_timesteps": None, "sigma_min": None, "clip_sample": 0}
    path.write_text(json.dumps(values))
    assert load_model(folder).scheduler == tiny[0].scheduler
