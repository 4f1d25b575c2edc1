"""Diffusers folders: `model_index.json`, and a folder of config and weights for each network."""

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jaxdiff.config import ConfigError, read_json
from jaxdiff.config.pipeline import PipelineOptions
from jaxdiff.config.scheduler import SchedulerConfig
from jaxdiff.diffusion.prediction import PREDICTION_TYPES
from jaxdiff.errors import WeightsError
from jaxdiff.files import replace_folder
from jaxdiff.io.configs import NETWORKS, VAES, as_config_error, check_channels, check_dtype, read_config
from jaxdiff.io.controlnet import load_controlnet
from jaxdiff.io.modules import STEMS, find_weights, load_tokenizer, write_json
from jaxdiff.io.tensor_files import load_tensors, save_tensors
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.model import Model, build, param_shapes, with_controlnets
from jaxdiff.typing import Params

TOKENIZERS, LOW_RES, CONTROLNET = ("tokenizer", "tokenizer_2"), "low_res_scheduler", "controlnet"
COMPONENTS = (*NETWORKS, *TOKENIZERS, "scheduler", LOW_RES, "model_index.json")
SCHEDULER = "scheduler_config.json"


def load_model(folder: Path, dtype: Any = None, *, prediction_type: str | None = None, remat: bool = False) -> Model:
    """The model of a folder without its weights; computes in `dtype`. See `load`."""
    if prediction_type not in (None, *PREDICTION_TYPES):
        known = ", ".join(PREDICTION_TYPES)
        raise ConfigError(f"prediction_type {prediction_type!r} is unknown; known are {known}.")
    index = read_json(folder / "model_index.json")
    if "transformer" in index:
        raise ConfigError(
            f"{folder} holds a {index.get('_class_name')}, which has no UNet: take a Stable Diffusion model."
        )

    def listed(name: str) -> bool:
        return isinstance(index.get(name), list) and None not in index[name]

    two, low_res = listed("text_encoder_2"), folder / LOW_RES
    present = {"text_encoder": listed("text_encoder") or not two, "text_encoder_2": two, "unet": True, "vae": True}
    present["vision_encoder"] = (folder / "vision_encoder").is_dir()
    configs: dict[str, Any] = {
        name: read_config(folder / name / "config.json", *(VAES if name == "vae" else (cls,)))
        if present[name]
        else None
        for name, cls in NETWORKS.items()
    }
    options = PipelineOptions.from_dict(index)
    if low_res.is_dir():
        options = dataclasses.replace(options, low_res_scheduler=SchedulerConfig.load(low_res / SCHEDULER))
    scheduler = SchedulerConfig.load(folder / "scheduler" / SCHEDULER)
    if prediction_type is not None:
        scheduler = dataclasses.replace(scheduler, prediction_type=prediction_type)
    tokenizers = [
        load_tokenizer(folder / name, configs[name.replace("tokenizer", "text_encoder")]) for name in TOKENIZERS
    ]
    return build(
        configs["text_encoder"],
        configs["unet"],
        configs["vae"],
        tokenizers[0],
        scheduler,
        configs["vision_encoder"],
        text_2=configs["text_encoder_2"],
        tokenizer_2=tokenizers[1],
        options=options,
        dtype=check_dtype(dtype),
        remat=remat,
    )


def load_folder(
    folder: Path,
    dtype: Any = None,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    remat: bool = False,
) -> tuple[Model, Params]:
    """The model of a folder and its parameters, with its ControlNets. See `load`."""
    dtype = check_dtype(dtype)
    model = load_model(folder, dtype, prediction_type=prediction_type, remat=remat)
    with as_config_error(f"the configs in {folder} do not make a model"):
        shapes = param_shapes(model)
    check_channels(model, folder)
    files = {name: find_weights(folder / name, name, variant) for name in shapes}
    params = {name: load_tensors(files[name], shapes[name], dtype) for name in shapes}
    if not (names := controlnets(folder)):
        return model, params
    nets = [load_controlnet(folder / name, dtype=dtype, variant=variant) for name in names]
    return with_controlnets(model, params, *nets)


def controlnets(folder: Path) -> list[str]:
    """Folders of a model's ControlNets, where `model_index.json` lists any: `controlnet`, `controlnet_1`, …"""
    if not any(read_json(folder / "model_index.json").get(CONTROLNET) or ()):
        return []
    more = (f"{CONTROLNET}_{i}" for i in itertools.count(1))
    return [CONTROLNET, *itertools.takewhile(lambda name: (folder / name).is_dir(), more)]


def pipeline_class(model: Model) -> str:
    """The class of PyTorch diffusers that draws with a model of this kind."""
    control = "ControlNet" if model.controlnets else ""
    if model.family == "upscaler":
        if control:
            raise WeightsError("PyTorch diffusers has no pipeline of an upscaler under ControlNets: save them alone.")
        return "StableDiffusionUpscalePipeline"
    sd1 = model.text_encoder_2 is None
    if model.scheduler.class_name == "LCMScheduler" and sd1 and not model.inpaints and not control:
        return "LatentConsistencyModelPipeline"
    kind = f"StableDiffusion{control}" if sd1 else f"StableDiffusionXL{control}"
    task = "Inpaint" if model.inpaints else "Img2Img" if model.family == "sdxl_refiner" else ""
    return f"{kind}{task}Pipeline"


def model_index(model: Model) -> dict[str, Any]:
    """`model_index.json`: the pipeline and the classes that PyTorch diffusers opens the folder with."""
    nothing, options, name = [None, None], model.options, pipeline_class(model)
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": "0.30.0",
        "feature_extractor": nothing,
        "scheduler": ["diffusers", model.scheduler.class_name],
        "text_encoder": encoder_class(model.text_encoder),
        "tokenizer": ["transformers", "CLIPTokenizer"] if model.tokenizer else nothing,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", model.vae.config.CLASS_NAME],
    }
    if model.controlnets:
        several = len(model.controlnets) > 1
        index[CONTROLNET] = ["diffusers", "MultiControlNetModel" if several else "ControlNetModel"]
    if options.guidance_scale != PipelineOptions.guidance_scale:
        index["_guidance_scale"] = options.guidance_scale
    if model.text_encoder_2 is not None:
        index |= {
            "text_encoder_2": encoder_class(model.text_encoder_2),
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "image_encoder": nothing,
            "force_zeros_for_empty_prompt": options.force_zeros_for_empty_prompt,
        }
        return index | (
            {"requires_aesthetics_score": options.requires_aesthetics_score}
            if "Inpaint" in name or "Img2Img" in name
            else {}
        )
    index["safety_checker"] = nothing
    if options.low_res_scheduler is not None:
        return index | {
            LOW_RES: ["diffusers", options.low_res_scheduler.class_name],
            "watermarker": nothing,
            "max_noise_level": options.max_noise_level,
        }
    return index | {"image_encoder": nothing, "requires_safety_checker": False}


def encoder_class(encoder: CLIPTextModel | None) -> list[str | None]:
    return [None, None] if encoder is None else ["transformers", encoder.config.to_dict()["architectures"][0]]


def save_folder(folder: Path, model: Model, params: Params, dtype: Any = None) -> None:
    """Write a model as a folder; whole or not at all. See `save`."""
    if folder.exists() and not (folder / "model_index.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise WeightsError(f"{folder} exists and is not the folder of a model: save to another one.")
    dtype = None if dtype is None else check_dtype(dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "new"
            write_model(new, model, params, dtype)
            replace_model(folder, new, Path(temporary) / "old")
    except OSError as e:
        raise WeightsError(
            f"{folder} cannot be written ({e.strerror or e}): choose another place or free it."
        ) from None


def replace_model(folder: Path, new: Path, old: Path) -> None:
    """Replace `folder` by `new`, and keep those of its files that are not part of a model."""
    if folder.exists():
        parts = {*COMPONENTS, *(p.name for p in new.iterdir())}
        with contextlib.suppress(ConfigError):  # a damaged model is replaced as well
            parts.update(controlnets(folder))
        for other in folder.iterdir():  # a model card, samples
            if other.name not in parts:
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, new / other.name)
    replace_folder(folder, new, old)


def write_model(folder: Path, model: Model, params: Params, dtype: Any) -> None:
    networks = [(name, module, params[name]) for name, module in model.modules.items()]
    for i, (net, own) in enumerate(zip(model.controlnets, params.get(CONTROLNET, ()), strict=True)):
        networks.append((f"{CONTROLNET}_{i}" if i else CONTROLNET, net, own))
    for name, module, own in networks:
        write_json(folder / name / "config.json", module.config.to_dict())
        # transformers 4 wants the prefix, 5 reads either.
        prefix = "text_model." if name.startswith("text_encoder") else ""
        stem = STEMS.get(name, STEMS["unet"])[0]
        save_tensors(folder / name / f"{stem}.safetensors", own, dtype, prefix)
    for name in TOKENIZERS:
        if (tokenizer := getattr(model, name)) is not None:
            tokenizer.save(folder / name)
    write_json(folder / "scheduler" / SCHEDULER, model.scheduler.to_dict())
    if model.options.low_res_scheduler is not None:
        write_json(folder / LOW_RES / SCHEDULER, model.options.low_res_scheduler.to_dict())
    write_json(folder / "model_index.json", model_index(model))
