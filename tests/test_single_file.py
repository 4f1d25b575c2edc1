"""One-file checkpoints: the names against those of diffusers' own converters, configs from shapes, round trips."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.config import CLIPTextConfig, ConfigError, UNetConfig, VAEConfig
from jaxdiff.io.inference import SCALING, TEXTS, detect, infer_configs, pipeline_options, scheduler_config
from jaxdiff.io.layouts import UNET_PREFIX, VAE_PREFIX, openclip_table, place, unet_table, vae_table
from jaxdiff.io.modules import load_vae, save_module
from jaxdiff.io.pretrained import BUNDLED, load, replace_config, save
from jaxdiff.io.single_file import IGNORED, _metadata, clip_tokenizer, load_single_file, save_single_file
from jaxdiff.io.sources import TensorSource, WeightsError, open_tensors
from jaxdiff.io.weights import named_tensors
from jaxdiff.models.model import build
from tests import tiny
from tests.networks import SDXL, XL_LEVELS
from tests.tiny import tiny_params

SD1 = UNetConfig(cross_attention_dim=768)
SD2 = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
REFINER = dataclasses.replace(
    SDXL,
    down_block_types=(*XL_LEVELS, "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=(1, 4, 4, 4),  # published as 4; the first level has none
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)
UPSCALER = UNetConfig(
    sample_size=128,
    in_channels=7,
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    block_out_channels=(256, 512, 512, 1024),
    cross_attention_dim=1024,
    use_linear_projection=True,
    only_cross_attention=(False, True, True, False),  # published as (True, True, True, False); level 0 has none
    num_class_embeds=1000,
)
VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)
VAE_X4 = dataclasses.replace(
    VAE,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(128, 256, 512),
    scaling_factor=0.08333,
)
VIT_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
VIT_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=1024,
)
BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    with_projection=True,
)
FULL = {  # family or variant -> UNet, VAE, text_encoder, text_encoder_2 as published
    "sd1": (SD1, VAE, VIT_L, None),
    "sd1 inpainting": (dataclasses.replace(SD1, in_channels=9), VAE, VIT_L, None),
    "sd1 distilled": (dataclasses.replace(SD1, time_cond_proj_dim=256), VAE, VIT_L, None),
    "sd2": (dataclasses.replace(SD2, sample_size=96), VAE, VIT_H, None),
    "sd2 inpainting": (dataclasses.replace(SD2, in_channels=9), VAE, VIT_H, None),
    "sdxl": (SDXL, VAE, VIT_L, BIG_G),
    "sdxl_refiner": (REFINER, VAE, None, BIG_G),
    "upscaler": (UPSCALER, VAE_X4, VIT_H, None),
}
FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")
BESIDE = {  # what published files hold beside the networks
    "model_ema.num_updates": [],
    "sqrt_recipm1_alphas_cumprod": [1000],
    "first_stage_model.model_ema.decay": [],
    "cond_stage_model.logit_scale": [],
    "cond_stage_model.transformer.text_projection.weight": [8, 8],
    "model_ema.diffusion_modelinput_blocks00weight": [2],
    "model_ema.decay": [],
    "alphas_cumprod": [1000],
    "sqrt_one_minus_alphas_cumprod": [1000],
    "posterior_log_variance_clipped": [1000],
    "betas": [1000],
    "first_stage_model.loss.logvar": [],
    "cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77],
}


def small_model(family: str):
    """A model of the family with as many levels, of few channels and layers."""
    unet, *_ = FULL[family]
    added = unet.addition_embed_type and {
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 4 * (5 if family == "sdxl_refiner" else 6),
        "transformer_layers_per_block": (1, 2, 3, 3)[: len(unet.block_out_channels)],
    }
    unet = dataclasses.replace(
        unet,
        block_out_channels=tuple(8 * (1 + i) for i in range(len(unet.block_out_channels))),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim={"sdxl": 32, "upscaler": 20}.get(family, 16),
        num_class_embeds=unet.num_class_embeds and 20,
        only_cross_attention=(False, True, True, True) if family == "upscaler" else False,
        **added or {},
    )
    first = dataclasses.replace(tiny.text_config(), num_hidden_layers=2)
    openclip = dataclasses.replace(first, hidden_act="gelu", projection_dim=16)
    second = dataclasses.replace(openclip, with_projection=True, projection_dim=8)
    text = {"sdxl_refiner": None, "sd2": openclip, "upscaler": openclip}.get(family, first)
    two = second if family.startswith("sdxl") else None
    return build(
        text,
        unet,
        dataclasses.replace(tiny.VAE, scaling_factor=SCALING.get(family, 0.18215)),
        text and tiny.tokenizer(),
        scheduler_config(family, "v_prediction" if family == "sd2" else None),
        text_2=two,
        tokenizer_2=two and tiny.tokenizer(),
        options=pipeline_options(family),
    )


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


def test_a_foreign_file_of_the_same_tensors(small, tmp_path):
    """Without our metadata, sizes come from the shapes, and the caller says what no shape tells."""
    family, model, params, path = small
    foreign = tmp_path / "foreign.safetensors"
    save_file(load_file(path) | {name: np.zeros(shape, np.float32) for name, shape in BESIDE.items()}, foreign)
    reopened, loaded = load_single_file(foreign, configs=untold(model))
    assert_equal(loaded, params)
    assert reopened.modules == model.modules
    assert (reopened.scheduler, reopened.options, reopened.family) == (model.scheduler, model.options, family)


def test_sd_turbo_has_the_layout_of_sdxl(tmp_path):
    """An SD 2.1 whose text encoder stands where the SDXL refiner has its own: the file reads as the folder does."""
    model = replace_config(small_model("sd2"), "unet", sample_size=64)
    model = dataclasses.replace(model, scheduler=scheduler_config("turbo"))
    params = tiny.tiny_params(model)
    save(tmp_path / "folder", model, params)
    moved = {n.replace("cond_stage_model.", "conditioner.embedders.0."): x for n, x in _tensors(model, params).items()}
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


def test_prediction_type_is_overridden(small):
    _, model, _, path = small
    assert load_single_file(path, prediction_type="epsilon")[0].scheduler == dataclasses.replace(
        model.scheduler, prediction_type="epsilon"
    )


def meta_models(name: str) -> dict:
    """Published networks as PyTorch makes them, without numbers: by key in `params`, with their configs."""
    torch, diffusers, transformers = (pytest.importorskip(m) for m in ("torch", "diffusers", "transformers"))
    unet, vae, *texts = FULL[name]
    with torch.device("meta"):
        models = {
            "unet": (unet, diffusers.UNet2DConditionModel.from_config(unet.to_dict())),
            "vae": (vae, diffusers.AutoencoderKL.from_config(vae.to_dict())),
        }
        for key, text in zip(("text_encoder", "text_encoder_2"), texts, strict=True):
            if text is not None:
                cls = transformers.CLIPTextModelWithProjection if text.with_projection else transformers.CLIPTextModel
                models[key] = (text, cls(transformers.CLIPTextConfig(**text.to_dict())))
    return models


def named_shapes(model) -> dict[str, list[int]]:
    return {n.removeprefix("text_model."): list(x.shape) for n, x in model.named_parameters()}


def original(name: str) -> dict[str, list[int]]:
    """Names and shapes in the original layout by our tables, from PyTorch's of diffusers' networks."""
    shapes = {}
    for key, (config, model) in meta_models(name).items():
        prefix = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **TEXTS[name.split()[0].replace("upscaler", "sd2")]}[key]
        for ours, shape in named_shapes(model).items():
            if prefix.endswith("text_model."):
                shapes[prefix + ours] = shape
                continue
            table = {"unet": unet_table, "vae": vae_table}.get(key, openclip_table)(config)
            at = place(ours, table, prefix)
            assert at is not None, ours
            rows = [3 * shape[0], *shape[1:]] if at.third is not None else shape
            shapes[at.name] = [*rows, 1, 1] if at.squeezed else rows[::-1] if at.transposed else rows
    return shapes


@pytest.mark.parametrize("name", FULL)
def test_names_are_those_of_diffusers_converters(name):
    """diffusers turns a file of our names into exactly the networks' tensors, and each from the right place."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders import single_file_utils as theirs

    models, shapes = meta_models(name), original(name)
    # Numbers that tell the tensors apart and take no memory: one value each, seen many times.
    marked = {n: torch.tensor(float(i)).expand(shape) for i, (n, shape) in enumerate(shapes.items())}
    assert {n: list(x.shape) for n, x in marked.items()} == shapes
    for key, convert, table, prefix in (
        ("unet", theirs.convert_ldm_unet_checkpoint, unet_table, UNET_PREFIX),
        ("vae", theirs.convert_ldm_vae_checkpoint, vae_table, VAE_PREFIX),
    ):
        config, model = models[key]
        found = convert(dict(marked), dict(model.config))
        expected = named_shapes(model)
        if config == FULL["sd1 distilled"][0]:  # of which their converter knows nothing
            del expected["time_embedding.cond_proj.weight"]
        assert {n: list(x.shape) for n, x in found.items()} == expected
        for ours, x in found.items():
            assert x.flatten()[0] == marked[place(ours, table(config), prefix).name].flatten()[0], ours


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl_refiner"])
def test_openclip_as_diffusers_converts_it(name):
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = small_model(name)
    params, key = tiny.tiny_params(model), "text_encoder" if name == "sd2" else "text_encoder_2"
    tensors = _tensors(model, params)
    (prefix,) = (p for p in TEXTS[name].values() if p.endswith(".model."))
    stand_in = dataclasses.make_dataclass("Encoder", ["config"])(model.modules[key].config)
    checkpoint = {n: torch.from_numpy(x) for n, x in tensors.items()}
    # Their converter takes the projection's width for the encoder's; in the published files both are the same.
    projection = checkpoint.pop(f"{prefix}text_projection", None)
    found = {
        n.removeprefix("text_model."): x.numpy()
        for n, x in convert_open_clip_checkpoint(stand_in, checkpoint, prefix=prefix).items()
    }
    expected = dict(named_tensors(params[key]))
    if projection is not None:
        np.testing.assert_array_equal(expected.pop("text_projection.weight"), projection.T)
    assert sorted(found) == sorted(expected)
    for n, x in expected.items():
        np.testing.assert_array_equal(found[n], x, err_msg=n)


def _tensors(model, params) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        save_single_file(Path(folder) / "x.safetensors", model, params)
        return load_file(Path(folder) / "x.safetensors")


@pytest.mark.parametrize("name", FULL)
def test_published_configs_are_inferred(name):
    source = TensorSource(Path("file"), original(name) | BESIDE, lambda _: np.zeros(0))
    unet, vae, text, text_2 = FULL[name]
    family = name.split()[0]
    assert detect(source) == family
    found = infer_configs(source, family)
    side = unet.sample_size if name != "sd2" else 64
    vae = dataclasses.replace(
        vae, scaling_factor=SCALING.get(family, 0.18215), sample_size=side * 2 ** (len(vae.block_out_channels) - 1)
    )
    assert found["unet"] == unet
    assert found["vae"] == vae
    assert found.get("text_encoder") == text
    assert found.get("text_encoder_2") == text_2
    prediction = "v_prediction" if name in ("sd2", "upscaler") else "epsilon"
    assert found["scheduler"].prediction_type == prediction


def test_sd2_leaves_out_the_layer_that_its_text_passes_by():
    shapes = original("sd2")
    layer = {n.replace("resblocks.22", "resblocks.23"): s for n, s in shapes.items() if "resblocks.22." in n}
    source = TensorSource(Path("file"), shapes | layer, lambda _: np.zeros(0))
    assert infer_configs(source, "sd2")["text_encoder"] == VIT_H
    assert all(IGNORED.fullmatch(n) for n in layer)
    turbo = {n.replace("cond_stage_model.", "conditioner.embedders.0."): s for n, s in (shapes | layer).items()}
    source = TensorSource(Path("file"), turbo, lambda _: np.zeros(0))
    found = infer_configs(source, detect(source))
    assert (found["text_encoder"], found["unet"], found["scheduler"]) == (VIT_H, SD2, scheduler_config("turbo"))
    assert all(IGNORED.fullmatch(n) for n in turbo if "resblocks.23." in n)


PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1 inpainting": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl inpainting": "StableDiffusionXLInpaintPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_opens_the_file(name, tmp_path):
    """The whole pipeline by diffusers' own loader, with the configs of the same model's folder."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    family, _, inpaints = name.partition(" ")
    model = small_model(family)
    if family.startswith("sdxl"):  # their loader wants a projection as wide as the encoder, and layer 9
        model = replace_config(model, "text_encoder_2", projection_dim=16, num_hidden_layers=10)
        width = model.unet.config.projection_class_embeddings_input_dim + 16 - 8
        model = replace_config(model, "unet", projection_class_embeddings_input_dim=width)
    if family == "sdxl":
        model = replace_config(model, "text_encoder", hidden_size=24)
        model = replace_config(model, "unet", cross_attention_dim=40)
    if inpaints:
        model = replace_config(model, "unet", in_channels=9)
    params = tiny.tiny_params(model)
    save(tmp_path / "folder", model, params)
    save_single_file(tmp_path / "x.safetensors", model, params)
    pipeline = getattr(diffusers, PIPELINES[name]).from_single_file(
        str(tmp_path / "x.safetensors"),
        config=str(tmp_path / "folder"),
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    for part in model.modules:
        theirs = {n.removeprefix("text_model."): x for n, x in getattr(pipeline, part).state_dict().items()}
        for n, x in named_tensors(params[part]):
            np.testing.assert_array_equal(theirs[n].numpy(), x, err_msg=f"{part} {n}")


@pytest.fixture
def tensors(tiny):
    return _tensors(*tiny)


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


def test_another_autoencoder_takes_the_models_place(tiny, tensors, tmp_path):
    """One-file checkpoints' autoencoders, alone or in a whole file, and a folder; the model's scale stays."""
    model, params = tiny
    other = tiny_params(model, seed=1)
    model = replace_config(model, "vae", scaling_factor=0.5)
    whole = _tensors(model, other)
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
    wide = json.loads((tmp_path / "folder/config.json").read_text()) | {"latent_channels": 8}
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
    with pytest.raises(ConfigError, match="nothing is missing"):
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


def test_clip_vocabulary():
    """CLIP's own ids; OpenCLIP's encoders get id 0 for padding."""
    ids = clip_tokenizer(VIT_L)(["a photo of a cat"])
    assert ids.shape == (1, 77)
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(ids[0, 7:].tolist()) == {49407}
    assert set(clip_tokenizer(BIG_G)(["a photo of a cat"])[0, 7:].tolist()) == {0}


def test_clip_vocabulary_as_transformers_reads_it():
    transformers = pytest.importorskip("transformers")
    texts = [
        "",
        "  A  CAT!!",
        "naïve café — 雪の猫 🐈‍⬛",
        "x" * 300,
        "don't we'll 12345 <|endoftext|> \t\n",
        "«ünïcödé» ﬁ",
    ]
    theirs = transformers.CLIPTokenizer.from_pretrained(BUNDLED / "clip_tokenizer", local_files_only=True)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    np.testing.assert_array_equal(clip_tokenizer(VIT_L)(texts), expected)
