"""Diffusers folders: `model_index.json`, and a folder of config and weights for each network."""

import contextlib
import dataclasses
import itertools
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdiff.config import CLIPTextConfig, ConfigError, GeneratorConfig, Qwen3Config, read_json
from jaxdiff.config.pipeline import PipelineOptions
from jaxdiff.config.scheduler import SchedulerConfig
from jaxdiff.errors import WeightsError
from jaxdiff.files import replace_folder, writing
from jaxdiff.io import programs
from jaxdiff.io.configs import (
    FOLDERS,
    as_config_error,
    check_channels,
    check_dtype,
    check_prediction_type,
    read_config,
)
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.io.infer_config import published_vae
from jaxdiff.io.kinds import SUPPORTED
from jaxdiff.io.model_paths import SINGLE_FILES
from jaxdiff.io.modules import CONFIG, STEMS, find_weights, load_tokenizer, variant_of, write_json
from jaxdiff.io.tensor_files import check_tensors, load_tensors, open_tensors, save_tensors
from jaxdiff.io.transformer_folder import GUIDANCE, INDEX, PIPELINES, check_encoders, encoder_class, transformer_index
from jaxdiff.io.transformer_layout import described_transformer, transformer_source
from jaxdiff.models.model import FAMILIES, Model, build, with_controlnets
from jaxdiff.typing import Params

TOKENIZERS, LOW_RES, CONTROLNET = ("tokenizer", "tokenizer_2", "tokenizer_3"), "low_res_scheduler", "controlnet"
SCHEDULER = "scheduler_config.json"
COMPONENTS = (*FOLDERS, *TOKENIZERS, "scheduler", LOW_RES, INDEX)
CLASSES = {  # parts of a pipeline -> their supported classes
    "unet": ("UNet2DConditionModel", GeneratorConfig.CLASS_NAME),
    "vae": ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLFlux2"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", "Qwen3ForCausalLM", "Qwen3Model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel"),
    "text_encoder_3": ("T5EncoderModel",),
    "transformer": tuple(cls.CLASS_NAME for cls in FAMILIES),
}
UNSUPPORTED_PARTS = (
    "prior", "decoder", "motion_adapter", "movq", "vqvae", "vqgan", "bert", "vocoder", "image_normalizer",
    "projection_model", "t2i_adapter",
)  # fmt: skip
_TASKS = r"(XL)?(ControlNet)?(Img2Img|Inpaint)?|StableDiffusionUpscale|LatentConsistencyModel(Img2Img)?"
GAN = "TextConditionalGANPipeline"  # jaxdiff's own, unknown to diffusers
SUPPORTED_PIPELINES = rf"(Flax)?(StableDiffusion{_TASKS})Pipeline"
UNSUPPORTED_PIPELINES = (
    "Pix2Pix(?!Zero)|Depth2Img|LatentUpscale|LDM3D|ImageVariation|GLIGEN|UnCLIP|PaintByExample|Marigold"
)


def load_model(
    folder: Path,
    dtype: Any = None,
    *,
    prediction_type: str | None = None,
    remat: bool = False,
    without_vae: bool = False,
    transformer: Path | None = None,
) -> Model:
    """The model of a folder without its weights; computes in `dtype`. See `load`.

    Args:
        without_vae: whether the folder may lack an autoencoder; its config is then the published one.
        transformer: a file that replaces the folder's transformer and determines its number of blocks.
    """
    check_prediction_type(prediction_type)
    index = read_index(folder)
    parts, low_res = listed_parts(index), folder / LOW_RES
    has_second_encoder, has_transformer = "text_encoder_2" in parts, "transformer" in parts
    present = {name: name in parts for name in ("text_encoder_2", "text_encoder_3", "transformer")}
    present |= {"text_encoder": "text_encoder" in parts or not has_second_encoder, "unet": not has_transformer}
    present["vae"] = not without_vae or (folder / "vae" / CONFIG).is_file()
    present["vision_encoder"] = (folder / "vision_encoder").is_dir()
    configs: dict[str, Any] = {
        name: read_config(folder / name / CONFIG, *known) if present[name] else None for name, known in FOLDERS.items()
    }
    if has_transformer:
        check_encoders(folder, configs)
    family = FAMILIES[type(configs["transformer"])] if has_transformer else ""
    configs["vae"] = configs["vae"] or published_vae(family or ("sdxl" if has_second_encoder else "sd1"))
    with as_config_error(f"{folder / INDEX} does not describe a pipeline"):
        options = PipelineOptions.from_dict({"_guidance_scale": GUIDANCE[family]} | index)
    if low_res.is_dir():
        options = dataclasses.replace(options, low_res_scheduler=SchedulerConfig.load(low_res / SCHEDULER))
    scheduler = SchedulerConfig.load(folder / "scheduler" / SCHEDULER)
    if prediction_type is not None:
        scheduler = scheduler.with_prediction_type(prediction_type)
    tokenizers = [
        load_tokenizer(
            folder / name, configs[name.replace("tokenizer", "text_encoder")], family, options.max_sequence_length
        )
        for name in TOKENIZERS
    ]
    model = build(
        configs["text_encoder"],
        configs["unet"],
        configs["vae"],
        tokenizers[0],
        scheduler,
        configs["vision_encoder"],
        text_2=configs["text_encoder_2"],
        tokenizer_2=tokenizers[1],
        text_3=configs["text_encoder_3"],
        tokenizer_3=tokenizers[2],
        transformer=configs["transformer"],
        options=options,
        dtype=check_dtype(dtype),
        remat=remat,
    )
    return model if transformer is None else with_transformer(model, folder, transformer)


def with_transformer(model: Model, path: Path, file: Path) -> Model:
    """The model with the transformer that a file describes; its weights are not read.

    Args:
        path: of the model, for error messages.

    Raises:
        ConfigError, WeightsError: the file holds something else, or the model takes no such file.
    """
    if not path.is_dir():
        raise ConfigError(f"{file} goes with a folder, which has the rest of the model, and {path} is a file.")
    if model.transformer is None:
        raise ConfigError(f"{file} is for a model with a transformer, and {path} has a UNet: give another --model.")
    config = described_transformer(open_tensors(file), model.transformer.config)
    return dataclasses.replace(model, transformer=model.transformer.copy(config=config))


def load_folder(
    folder: Path,
    dtype: Any = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    remat: bool = False,
    without_vae: bool = False,
    mesh: Mesh | None = None,
    transformer: Path | None = None,
    parts: Sequence[str] | None = None,
) -> tuple[Model, Params]:
    """The model of a folder and its parameters, with its ControlNets. See `load`."""
    dtype = check_dtype(dtype)
    model = load_model(
        folder, dtype, prediction_type=prediction_type, remat=remat, without_vae=without_vae, transformer=transformer
    )
    with as_config_error(f"the configs in {folder} do not make a model"):
        shapes = programs.shapes(model)
    check_channels(model, folder)
    if without_vae and not _has_vae(folder):
        shapes = {name: tree for name, tree in shapes.items() if name != "vae"}
    shapes = {name: tree for name, tree in shapes.items() if parts is None or name in parts}
    names = controlnets(folder)
    variants = {
        name: variant_of(folder / name, name if name in STEMS else "unet", variant) for name in (*shapes, *names)
    }
    if variant and not any(variants.values()):
        raise WeightsError(f"{folder} holds no weights of the variant {variant!r}: leave it out, or name another.")
    files: dict[str, Any] = {
        name: find_weights(folder / name, name, variants[name])
        for name in shapes
        if name != "transformer" or transformer is None
    }
    if transformer is not None and "transformer" in shapes:
        files["transformer"] = transformer_source(open_tensors(transformer), model.family, shapes["transformer"])
    if model.transformer is not None:  # large: check all names and shapes before reading any part
        for name, shape in shapes.items():
            check_tensors(files[name], shape)
    params = {name: load_tensors(files[name], shapes[name], dtype, mesh) for name in shapes}
    nets = [load_controlnet(folder / name, dtype=dtype, variant=variants[name], mesh=mesh) for name in names]
    return with_controlnets(model, params, *nets) if nets else (model, params)


def _has_vae(folder: Path) -> bool:
    """Whether a folder has an autoencoder with its weights."""
    try:
        return (folder / "vae" / CONFIG).is_file() and bool(find_weights(folder / "vae", "vae"))
    except WeightsError:
        return False


def read_index(folder: Path) -> dict[str, Any]:
    """Read the `model_index.json` of a supported model.

    Raises:
        ConfigError: it is missing, damaged, or of an unsupported pipeline; the message says what the folder is.
    """
    path = folder / INDEX
    if not path.is_file() and (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        class_name = config.get("_class_name") or config.get("model_type") or "network"
        raise ConfigError(f"{folder} holds one {class_name}, not a whole model: {INDEX} is missing.")
    single = sorted(p for p in folder.glob("*.*") if p.suffix.lower() in SINGLE_FILES)
    if not path.is_file() and single and not (folder / "unet").is_dir():
        raise ConfigError(f"{path} is missing: if one of the folder's files is the model, give its path, {single[0]}.")
    index = read_json(path)
    if reason := _unsupported_reason(index):
        name = index.get("_class_name") or "pipeline"
        raise ConfigError(f"{folder} holds a {name}, which {reason}: {SUPPORTED}.")
    return index


def listed_parts(index: dict[str, Any]) -> dict[str, str]:
    """The parts of a pipeline and their classes."""
    parts = {name: part for name, part in index.items() if isinstance(part, list) and None not in part}
    return {name: str(part[-1]).removeprefix("Flax") if part else "" for name, part in parts.items()}


def _unsupported_reason(index: dict[str, Any]) -> str | None:
    """Why a pipeline is not supported, as the end of a sentence; None if it is."""
    parts, class_name = listed_parts(index), str(index.get("_class_name") or "")
    for part, classes in CLASSES.items():
        if part in parts and parts[part] not in classes:
            return f"has a {parts[part]} as its {part}, not a {classes[0]}"
    if unsupported := [part for part in UNSUPPORTED_PARTS if part in parts]:
        return f"needs a {unsupported[0]}"
    if re.search(UNSUPPORTED_PIPELINES, class_name):
        return "is not supported"
    encoders = [part for part in parts if part.startswith("text_encoder")]
    if parts and "image_encoder" in parts and not encoders:
        return "has no text encoder"
    is_complete = ("unet" in parts or "transformer" in parts) and "vae" in parts and encoders
    return (
        None if not class_name or is_complete or re.fullmatch(SUPPORTED_PIPELINES, class_name) else "is not supported"
    )


def controlnets(folder: Path) -> list[str]:
    """Folders of the ControlNets that `model_index.json` lists: `controlnet`, `controlnet_1`, …"""
    if not any(read_json(folder / INDEX).get(CONTROLNET) or ()):
        return []
    numbered = (f"{CONTROLNET}_{i}" for i in itertools.count(1))
    return [CONTROLNET, *itertools.takewhile(lambda name: (folder / name).is_dir(), numbered)]


def is_part(name: str) -> bool:
    """Whether a file or folder of this name belongs to a model."""
    return name in COMPONENTS or name.startswith(CONTROLNET)


def pipeline_class(model: Model) -> str:
    """The PyTorch diffusers pipeline class of a model; for GANs, which diffusers lacks, jaxdiff's own."""
    if model.transformer is not None:
        return PIPELINES[model.family]
    if model.is_gan:
        return GAN
    control = "ControlNet" if model.controlnets else ""
    if model.family == "upscaler":
        if control:
            raise WeightsError("PyTorch diffusers has no pipeline of an upscaler under ControlNets: save them alone.")
        return "StableDiffusionUpscalePipeline"
    sd1 = model.text_encoder_2 is None
    embeds_guidance = model.unet.config.time_cond_proj_dim is not None  # as that pipeline requires
    if model.scheduler.class_name == "LCMScheduler" and embeds_guidance and sd1 and not model.inpaints and not control:
        return "LatentConsistencyModelPipeline"
    kind = f"StableDiffusion{control}" if sd1 else f"StableDiffusionXL{control}"
    task = "Inpaint" if model.inpaints else "Img2Img" if model.family == "sdxl_refiner" else ""
    return f"{kind}{task}Pipeline"


def model_index(model: Model) -> dict[str, Any]:
    """`model_index.json`: the pipeline and the classes that PyTorch diffusers opens the folder with."""
    absent, options, class_name = [None, None], model.options, pipeline_class(model)
    if model.transformer is not None:
        return transformer_index(model)
    index: dict[str, Any] = {
        "_class_name": class_name,
        "_diffusers_version": "0.30.0",
        "feature_extractor": absent,
        "scheduler": ["diffusers", model.scheduler.class_name],
        "text_encoder": encoder_class(model.text_encoder),
        "tokenizer": ["transformers", "CLIPTokenizer"] if model.tokenizer else absent,
        "unet": ["jaxdiff" if model.is_gan else "diffusers", model.unet.config.CLASS_NAME],
        "vae": ["diffusers", model.vae.config.CLASS_NAME],
    }
    if model.controlnets:
        several = len(model.controlnets) > 1
        index[CONTROLNET] = ["diffusers", "MultiControlNetModel" if several else "ControlNetModel"]
    if options.guidance_scale != PipelineOptions.guidance_scale:
        index["_guidance_scale"] = options.guidance_scale
    if options.steps != PipelineOptions.steps:
        index["_steps"] = options.steps
    if options.pag_scale:
        index |= {"_pag_scale": options.pag_scale, "_pag_layers": list(options.pag_layers)}
    if model.text_encoder_2 is not None:
        index |= {
            "text_encoder_2": encoder_class(model.text_encoder_2),
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "image_encoder": absent,
            "force_zeros_for_empty_prompt": options.force_zeros_for_empty_prompt,
        }
        return index | (
            {"requires_aesthetics_score": options.requires_aesthetics_score}
            if "Inpaint" in class_name or "Img2Img" in class_name
            else {}
        )
    index["safety_checker"] = absent
    if options.low_res_scheduler is not None:
        return index | {
            LOW_RES: ["diffusers", options.low_res_scheduler.class_name],
            "watermarker": absent,
            "max_noise_level": options.max_noise_level,
        }
    return index | {"image_encoder": absent, "requires_safety_checker": False}


def save_folder(folder: Path, model: Model, params: Params, dtype: Any = None) -> None:
    """Write a model as a folder, atomically. See `save`."""
    if folder.exists() and not (folder / INDEX).exists() and (folder.is_file() or any(folder.iterdir())):
        raise WeightsError(f"{folder} exists and is not the folder of a model: save to another one.")
    dtype = None if dtype is None else check_dtype(dtype)
    with writing(folder, WeightsError, "choose another place or free it."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "new"
            write_model(new, model, params, dtype)
            replace_model(folder, new, Path(temporary) / "old")


def replace_model(folder: Path, new: Path, old: Path) -> None:
    """Replace the model in `folder` by `new`; files that are not part of a model are kept."""
    if folder.exists():
        parts = {*COMPONENTS, *(p.name for p in new.iterdir())}
        with contextlib.suppress(ConfigError):  # a damaged model is replaced too
            parts.update(controlnets(folder))
        for other in folder.iterdir():  # a model card, samples
            if other.name not in parts:
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, new / other.name)
    replace_folder(folder, new, old)


def write_model(folder: Path, model: Model, params: Params, dtype: Any) -> None:
    networks = [(name, module, params[name]) for name, module in model.modules.items()]
    for i, (net, network_params) in enumerate(zip(model.controlnets, params.get(CONTROLNET, ()), strict=True)):
        networks.append((f"{CONTROLNET}_{i}" if i else CONTROLNET, net, network_params))
    for name, module, network_params in networks:
        write_json(folder / name / CONFIG, module.config.to_dict())
        # transformers 4 requires the prefix, 5 reads either.
        prefix = {CLIPTextConfig: "text_model.", Qwen3Config: "model."}.get(type(module.config), "")
        stem = STEMS.get(name, STEMS["unet"])[0]
        save_tensors(folder / name / f"{stem}.safetensors", network_params, dtype, prefix)
    for name in TOKENIZERS:
        if (tokenizer := getattr(model, name)) is not None:
            tokenizer.save(folder / name)
    write_json(folder / "scheduler" / SCHEDULER, model.scheduler.to_dict())
    if model.options.low_res_scheduler is not None:
        write_json(folder / LOW_RES / SCHEDULER, model.options.low_res_scheduler.to_dict())
    write_json(folder / INDEX, model_index(model))
