"""Folders of every family, in and out: PyTorch diffusers' are read, and it opens those that are written."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdiff
from jaxdiff.config import ConfigError, PipelineOptions, SchedulerConfig, UNetConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.diffusers_folder import load_model, pipeline_class
from jaxdiff.io.modules import find_weights
from jaxdiff.io.torch_names import tensor_name, to_torch_layout
from jaxdiff.models.model import build, param_shapes
from tests.support import tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.support import pipelines  # noqa: E402
from tests.support.pipelines import LATENT, SIDE  # noqa: E402
from tests.support.published import CONTROLNETS  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
    "distilled": "StableDiffusionPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "xl_inpaint": "StableDiffusionXLInpaintPipeline",
    "taesd": "StableDiffusionPipeline",
    "control": "StableDiffusionControlNetPipeline",
    "xl_controls": "StableDiffusionXLControlNetPipeline",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """PyTorch's pipeline of each family."""
    folder = tmp_path_factory.mktemp("parts")
    return {name: pipelines.pipeline(name, folder) for name in CLASSES}


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    """A folder of each family as PyTorch diffusers writes it. Not to be written to."""
    folder = tmp_path_factory.mktemp("families")
    for name, pipeline in made.items():
        pipeline.save_pretrained(folder / name)
    return folder


def tensors(folder):
    """Every module's tensors by their names, without the prefix that only some versions of transformers write."""
    files = {p.parent.name: load_file(p) for p in sorted(folder.glob("*/*.safetensors"))}
    return {
        (module, name.removeprefix("text_model.")): x for module, found in files.items() for name, x in found.items()
    }


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=str(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_there_and_back(name, made, folders, tmp_path):
    """The tensors' bytes, the model, its ControlNets and what PyTorch makes of the folder come back."""
    model, params = jaxdiff.load(folders / name)
    jaxdiff.save(tmp_path / "ours", model, params)
    assert_same_tensors(tensors(tmp_path / "ours"), tensors(folders / name))
    again, params_again = jaxdiff.load(tmp_path / "ours")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipeline).__name__ == CLASSES[name] == pipeline_class(model)
    theirs = made[name]
    for part, module in theirs.components.items():
        if isinstance(module, torch.nn.Module):
            loaded = getattr(pipeline, part).state_dict()
            assert all(torch.equal(loaded[key], x) for key, x in module.state_dict().items()), part
    for option in ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "max_noise_level"):
        assert pipeline.config.get(option) == theirs.config.get(option)
    if name == "upscaler":
        assert model.options.low_res_scheduler.beta_schedule == "squaredcos_cap_v2"
        assert pipeline.low_res_scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_controlnets_are_saved_where_params_has_them(folders, tmp_path):
    """One less leaves no folder behind, and one that the model never listed stays."""
    model, params = jaxdiff.load(folders / "xl_controls")
    jaxdiff.save(tmp_path / "model", model, params)
    assert {p.name for p in tmp_path.glob("model/controlnet*")} == {"controlnet", "controlnet_1"}
    fewer = dataclasses.replace(model, controlnets=model.controlnets[:1])
    jaxdiff.save(tmp_path / "model", fewer, params | {"controlnet": params["controlnet"][:1]})
    assert {p.name for p in tmp_path.glob("model/controlnet*")} == {"controlnet"}
    with pytest.raises(WeightsError, match="A single file cannot hold ControlNets"):
        jaxdiff.save(tmp_path / "model.safetensors", model, params)
    without = {name: x for name, x in params.items() if name != "controlnet"}
    jaxdiff.save(tmp_path / "model", model, without)
    assert not list(tmp_path.glob("model/controlnet*"))
    (tmp_path / "model/controlnet").mkdir()
    jaxdiff.save(tmp_path / "model", model, without)
    assert (tmp_path / "model/controlnet").is_dir()
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/controlnet").rmdir()
    (tmp_path / "model/model_index.json").write_text(json.dumps(index | {"controlnet": ["diffusers", "x"]}))
    with pytest.raises(ConfigError, match="controlnet does not exist: give a ControlNetModel folder"):
        jaxdiff.load(tmp_path / "model")


def test_one_file_there_and_back(folders, tmp_path):
    """`load` and `save` know one-file checkpoints by their names."""
    model, params = jaxdiff.load(folders / "sdxl")
    jaxdiff.save(tmp_path / "xl.safetensors", model, params)
    again, params_again = jaxdiff.load(tmp_path / "xl.safetensors")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


# Files of weights.


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def renamed(folder, old, new):
    for path in sorted(folder.glob(f"*/*{old}")):
        path.rename(path.with_name(path.name.removesuffix(old) + new))


def test_variants(folder):
    """Without a variant the plain files are read, and others only where there are no plain ones."""
    shutil.copy(
        folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    assert find_weights(folder / "unet", "unet").name == "diffusion_pytorch_model.safetensors"
    assert find_weights(folder / "unet", "unet", "fp16").name == "diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(WeightsError, match=r"text_encoder holds no weights of the variant 'fp16': leave it out"):
        find_weights(folder / "text_encoder", "text_encoder", "fp16")
    with pytest.raises(WeightsError, match=r"model holds no weights of the variant 'bf16': leave it out"):
        jaxdiff.load(folder, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_of_variants_alone(variant, tiny, folder):
    renamed(folder, ".safetensors", ".fp16.safetensors")
    params = jaxdiff.load(folder, variant=variant)[1]
    jax.tree.map(np.testing.assert_array_equal, params, dict(tiny[1]))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(variant, tiny, folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    found = load_file(path)
    path.unlink()
    names = sorted(found)
    places = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model{variant}-{i:05d}-of-00002.safetensors"
        save_file({n: found[n] for n in part}, path.with_name(file))
        places |= dict.fromkeys(part, file)
    index = path.with_name(f"diffusion_pytorch_model.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    jax.tree.map(np.testing.assert_array_equal, jaxdiff.load(folder)[1], dict(tiny[1]))


def test_links_as_in_the_hubs_cache(tiny, folder):
    """A snapshot is a folder of links to files named by their content."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(p for p in sorted(folder.rglob("*")) if p.is_file()):
        path.rename(blobs / str(i))
        path.symlink_to(f"{'../' * len(path.relative_to(folder.parent).parents[:-1])}blobs/{i}")
    jax.tree.map(np.testing.assert_array_equal, jaxdiff.load(folder)[1], dict(tiny[1]))


def test_pickles_of_tensors(tiny, folder):
    for path in sorted(folder.glob("*/*.safetensors")):
        stem = "pytorch_model" if path.parent.name == "text_encoder" else "diffusion_pytorch_model"
        torch.save({k: torch.from_numpy(v) for k, v in load_file(path).items()}, path.with_name(f"{stem}.bin"))
        path.unlink()
    jax.tree.map(np.testing.assert_array_equal, jaxdiff.load(folder)[1], dict(tiny[1]))


def test_other_architectures_are_named(folder):
    index = folder / "model_index.json"
    index.write_text(
        json.dumps({"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]})
    )
    with pytest.raises(ConfigError, match="holds a PixArtSigmaPipeline, which has a PixArtTransformer2DModel as its"):
        jaxdiff.load(folder)


def test_half_precision_decodes_sdxl_in_single(folders):
    """SDXL's autoencoder overflows in float16; bfloat16 has the range."""
    assert load_model(folders / "sdxl", "float16").vae.dtype == np.float32
    assert load_model(folders / "sdxl", "float16").unet.dtype == np.float16
    assert load_model(folders / "sdxl", "bfloat16").vae.dtype == "bfloat16"


# What `generate` refuses.

IMAGE, SMALL = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((LATENT, LATENT, 3), np.uint8)
MASK = np.ones((SIDE, SIDE), bool)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("sd1", {"mask": MASK}, "mask needs the image that it is laid over"),
        ("sd1", {"image": IMAGE, "mask": MASK[:-1]}, r"mask has shape \[15, 16\], the image \[16, 16\]"),
        ("sd1", {"image": IMAGE, "mask": np.ones((3, SIDE, SIDE))}, "mask holds 3 masks for 2 prompts"),
        ("sd1", {"image": IMAGE, "strength": -0.5}, r"strength -0\.5 must be in \(0, 1\]"),
        ("sd1", {"image": [IMAGE] * 3}, "image holds 3 images for 2 prompts"),
        ("sd1", {"guidance_rescale": 1.5}, r"guidance_rescale 1\.5 must be from 0\.0 to 1\.0"),
        ("sd1", {"guidance_interval": (3, 1)}, r"guidance_interval \(3, 1\) must be two noise levels, the lower"),
        ("sd1", {"guidance_scale": [1, 2, 3]}, r"guidance_scale has shape \[3\] for 2 prompts"),
        ("sd1", {"prompts_2": "a castle"}, "prompts_2 are for the second text encoder of SDXL"),
        ("sd1", {"clip_skip": 9}, "clip_skip 9 must be 0 to 3"),
        ("sd1", {"control_images": IMAGE}, "this model has none"),
        ("inpaint", {}, "this model is for inpainting: give image and mask"),
        ("upscaler", {}, "this model is for upscaling: give the small image as image"),
        ("upscaler", {"image": SMALL, "noise_level": 41}, "noise_level 41 must be from 0 to 40"),
        ("upscaler", {"image": SMALL, "noise_level": -1}, "noise_level -1 must be from 0 to 40"),
        (
            "upscaler",
            {"image": IMAGE, "height": SIDE},
            r"image has shape \[16, 16, 3\], but the output is \[8, 16, 3\]",
        ),
    ],
)
def test_bad_arguments_are_named(name, options, sentence, folders):
    with pytest.raises(ValueError, match=sentence):
        jaxdiff.generate(*jaxdiff.load(folders / name), ["a", "b"], **{"steps": 2} | options)


def test_a_controlnet_of_another_width_is_named(folders):
    from jaxdiff.config import ControlNetConfig
    from jaxdiff.models.controlnet import ControlNet
    from jaxdiff.models.model import with_controlnets

    model, params = jaxdiff.load(folders / "sd1")
    wide = ControlNet(ControlNetConfig.from_dict(dataclasses.asdict(model.unet.config) | {"cross_attention_dim": 99}))
    with pytest.raises(ConfigError, match=r"the ControlNet's cross_attention_dim is 99, this UNet's is 16"):
        with_controlnets(model, params, (wide, {}))


# Full-size shapes, without memory: PyTorch's on its meta device, ours by `eval_shape`.

FULL_UNETS = {
    "sd2": CONTROLNETS["sd2"],  # a ControlNet has the sizes of the half that it copies
    "sdxl": CONTROLNETS["sdxl"] | {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    "refiner": {
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
    "upscaler": {
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "only_cross_attention": (True, True, True, False),
        "cross_attention_dim": 1024,
        "num_class_embeds": 1000,
        "use_linear_projection": True,
    },
    "inpaint": {"in_channels": 9, "cross_attention_dim": 768},
    "lcm": {"time_cond_proj_dim": 256, "cross_attention_dim": 768},
}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def torch_shapes(make):
    with torch.device("meta"):
        return {name.removeprefix("text_model."): tuple(p.shape) for name, p in make().named_parameters()}


def our_shapes(tree):
    from flax.traverse_util import flatten_dict

    return {
        tensor_name(path): to_torch_layout(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
        for path, leaf in flatten_dict(tree).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_UNETS)
def test_published_sizes(name):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    text = dataclasses.replace(tiny.text_config(), **BIG_G, vocab_size=49408, max_position_embeddings=77)
    text = dataclasses.replace(text, with_projection=True)
    options = PipelineOptions(requires_aesthetics_score=name == "refiner")
    model = build(
        None, UNetConfig.from_dict(FULL_UNETS[name]), tiny.VAE, None, SchedulerConfig(), text_2=text, options=options
    )
    shapes = param_shapes(model)
    assert our_shapes(shapes["unet"]) == torch_shapes(lambda: diffusers.UNet2DConditionModel(**FULL_UNETS[name]))
    theirs = torch_shapes(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G)))
    assert our_shapes(shapes["text_encoder_2"]) == theirs
