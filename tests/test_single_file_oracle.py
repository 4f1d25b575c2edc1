"""One-file checkpoints against diffusers: the names of its own converters, configs from shapes, whole pipelines."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.io.configs import replace_config
from jaxdiff.io.infer_config import SCALING, TEXTS, detect, infer_configs, scheduler_config
from jaxdiff.io.model_paths import BUNDLED
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX, openclip_table, place, unet_table, vae_table
from jaxdiff.io.pretrained import save
from jaxdiff.io.single_file import IGNORED, clip_tokenizer, save_single_file
from jaxdiff.io.tensor_files import TensorSource, named_tensors
from tests.support import tiny
from tests.support.published import BESIDE, BIG_G, FULL, SD2, VIT_H, VIT_L, small_model, tensors_of


@functools.cache
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


@functools.cache
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


@pytest.mark.parametrize("name", ["sd2", "sdxl", pytest.param("sdxl_refiner", marks=pytest.mark.slow)])
def test_openclip_as_diffusers_converts_it(name):
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = small_model(name)
    params, key = tiny.tiny_params(model), "text_encoder" if name == "sd2" else "text_encoder_2"
    tensors = tensors_of(model, params)
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


@pytest.mark.slow
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
