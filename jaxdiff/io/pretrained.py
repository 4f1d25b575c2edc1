"""Models in and out: diffusers folders, that is `model_index.json` and a folder of config and weights for each module,
and by way of other files here single-file checkpoints and the Hugging Face hub."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    Config,
    ConfigError,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    read_json,
)
from jaxdiff.diffusion.prediction import PREDICTION_TYPES
from jaxdiff.errors import WeightsError
from jaxdiff.files import replace_folder
from jaxdiff.io.configs import check_drawn, making, read_config
from jaxdiff.io.torch_names import load_tensors, save_tensors
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.model import Model, build, param_shapes, with_controlnets
from jaxdiff.scheduler_config import PipelineOptions, SchedulerConfig
from jaxdiff.tokenizer import Tokenizer
from jaxdiff.typing import Params

BUNDLED = Path(__file__).parent.parent / "bundled"
CONFIGS: dict[str, type[Config]] = {
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "vision_encoder": CLIPVisionConfig,
}
VAES: tuple[type[Config], ...] = (VAEConfig, TinyVAEConfig)  # what may stand in the folder `vae`
STEMS = {  # names of weights' files as diffusers (unet, vae) and transformers write them; other libraries' after them
    "unet": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_flax_model"),
    "text_encoder": ("model", "pytorch_model", "flax_model"),
    "text_encoder_2": ("model", "pytorch_model", "flax_model"),
    "vision_encoder": ("model", "pytorch_model", "flax_model"),
}
SUFFIXES = (  # of those files, {} the variant; the first found is read
    ".safetensors.index{}.json",
    "{}.safetensors",
    ".bin.index{}.json",
    "{}.bin",
    "{}.msgpack",
)
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")
TOKENIZERS, LOW_RES, CONTROLNET = ("tokenizer", "tokenizer_2"), "low_res_scheduler", "controlnet"
COMPONENTS = (*CONFIGS, *TOKENIZERS, "scheduler", LOW_RES, "model_index.json")
SCHEDULER = "scheduler_config.json"
DTYPES = ("float32", "bfloat16", "float16")


def bundled() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/model_index.json"))


def find(name_or_path: str | Path, variant: str | None = None) -> Path:
    """A model's folder or file: a path, a bundled model's name, or "owner/name" on the hub, which is then fetched.

    Args:
        name_or_path: "owner/name@v1.0" is the hub's model at that branch, tag or commit.
        variant: of the weights to be fetched, see `load`.

    Raises:
        ConfigError: it is none of these, or cannot be fetched; the sentence says what there is.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if path.is_dir() or (path.is_file() and path.suffix in SINGLE_FILES):
        return path
    if path.is_file():
        raise ConfigError(f"{path} is no model's file: known are {', '.join(SINGLE_FILES)}, and diffusers folders.")
    if name in bundled():
        return BUNDLED / name
    if (hub := re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name)) and path.suffix not in SINGLE_FILES:
        from jaxdiff.io.hub import fetch

        return fetch(hub[1], hub[2], variant)
    if path.suffix in SINGLE_FILES:
        raise ConfigError(f"The model's file {name} does not exist: check the path, or fetch the file first.")
    known = ", ".join(bundled()) or "none"
    raise ConfigError(
        f"{name} is no folder and no bundled model (bundled: {known}): give a diffusers folder, a .safetensors or "
        ".ckpt file, or owner/name on the Hugging Face hub."
    )


def find_weights(folder: Path, name: str, variant: str | None = None) -> Path:
    """The file that holds a module's weights, or the index of several such files.

    Args:
        folder: the module's.
        name: of the module, a key of `STEMS`.
        variant: "fp16" reads `….fp16.safetensors`; None reads files without such a word, else the only ones there are.

    Raises:
        WeightsError: there are none.
    """
    for middle in (f".{variant}",) if variant else ("", ".*"):
        for stem in STEMS[name]:
            for suffix in SUFFIXES:
                found = sorted(folder.glob(stem + suffix.format(middle)))
                if found:
                    return found[0]
    if variant:
        raise WeightsError(f"{folder} holds no weights of the variant {variant!r}: leave it out, or name another.")
    raise WeightsError(f"{folder / STEMS[name][0]}.safetensors is missing: is the folder a complete diffusers folder?")


def check_dtype(dtype: Any) -> Any:
    """A floating type by name or as a type. Raises ConfigError listing the known."""
    name = "float32" if dtype is None else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}.")
    return jnp.dtype(name)


def load_model(folder: Path, dtype: Any = None, *, prediction_type: str | None = None, remat: bool = False) -> Model:
    """The model of a folder without its weights; computes in `dtype`. See `load`."""
    if prediction_type not in (None, *PREDICTION_TYPES):
        known = ", ".join(PREDICTION_TYPES)
        raise ConfigError(f"prediction_type {prediction_type!r} is unknown; known are {known}.")
    index = read_json(folder / "model_index.json")
    if "transformer" in index:
        raise ConfigError(
            f"{folder} is of {index.get('_class_name')}, which has no UNet: take a Stable Diffusion model."
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
        for name, cls in CONFIGS.items()
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


def load_tokenizer(folder: Path, text: CLIPTextConfig | None) -> Tokenizer | None:
    """The tokenizer of a text encoder, no longer than that reads; None where there is no encoder."""
    if text is None:
        return None
    tokenizer = Tokenizer.load(folder)
    return dataclasses.replace(tokenizer, max_length=min(tokenizer.max_length, text.max_position_embeddings))


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    remat: bool = False,
) -> tuple[Model, Params]:
    """Open a model.

    Args:
        name_or_path: a diffusers folder, a single-file checkpoint (.safetensors, .ckpt), the name of a bundled model
            ("icons"), or "owner/name" on the Hugging Face hub ("owner/name@v1.0" at a branch, tag or commit).
        dtype: type to compute in and to hold the parameters in: "float32" (default), "bfloat16" or "float16".
        variant: of a folder's weights: "fp16" reads its `*.fp16.safetensors`; None those without such a word, where
            there are any.
        prediction_type: what the UNet was trained to predict, "epsilon", "v_prediction", …, where the file does not say
            so or says it wrong: of one-file checkpoints of SD 2.x those for 512 pixels predict epsilon.
        remat: recompute activations in the backward pass, for gradients through large models.

    Returns:
        The model, static under `jit`, with the ControlNets that its folder lists, and its parameters on the default
        device. Each tensor goes from the
        memory-mapped file straight to its place, so that the peak is the parameters and one tensor.

    Raises:
        ConfigError, WeightsError: one sentence naming the file and the mend.
    """
    folder, dtype = find(name_or_path, variant), check_dtype(dtype)
    if folder.is_file():
        from jaxdiff.io.single_file import load_single_file

        return load_single_file(folder, dtype, remat, prediction_type=prediction_type)
    model = load_model(folder, dtype, prediction_type=prediction_type, remat=remat)
    with making(f"the configs in {folder} do not make a model"):
        shapes = param_shapes(model)
    check_drawn(model, folder)
    files = {name: find_weights(folder / name, name, variant) for name in shapes}
    params = {name: load_tensors(files[name], shapes[name], dtype) for name in shapes}
    if not (names := controlnets(folder)):
        return model, params
    from jaxdiff.io.controlnet import load_controlnet

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


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parts(model: Model, params: Params) -> Params:
    """Of parameters those of the model: its modules', and its ControlNets'."""
    return {name: params[name] for name in (*model.modules, *([CONTROLNET] if model.controlnets else ()))}


def save(folder: str | Path, model: Model, params: Params, *, dtype: Any = None) -> None:
    """Write a diffusers folder that PyTorch diffusers and `load` open; whole or not at all.

    ControlNets go along where `params` holds theirs, as "controlnet".

    Args:
        folder: made; if it is a model's folder already, its model is replaced and other files in it stay; any other
            non-empty folder is refused. A name that ends in .safetensors becomes a single-file checkpoint.
        dtype: type of the tensors written; as they are by default.

    Raises:
        WeightsError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if CONTROLNET not in params:
        model = dataclasses.replace(model, controlnets=())
    if folder.suffix == ".safetensors":
        from jaxdiff.io.single_file import save_single_file

        return save_single_file(folder, model, params, dtype)
    if folder.exists() and not (folder / "model_index.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise WeightsError(f"{folder} exists and is no model's folder: name another one to save to.")
    dtype = None if dtype is None else check_dtype(dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "new"
            write_model(new, model, params, dtype)
            exchange(folder, new, Path(temporary) / "old")
    except OSError as e:
        raise WeightsError(
            f"{folder} cannot be written ({e.strerror or e}): choose another place or free it."
        ) from None


def exchange(folder: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `folder`, if there is one, along with its files that are no part of a model."""
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


def replace_config(model: Model, name: str, **changes: Any) -> Model:
    """The model with some values of one module's config changed, such as a measured `scaling_factor`."""
    module = getattr(model, name)
    return dataclasses.replace(model, **{name: module.copy(config=dataclasses.replace(module.config, **changes))})
