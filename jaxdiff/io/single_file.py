"""Loading and saving one-file checkpoints in the original layout of latent diffusion (`.safetensors`, `.ckpt`).

The names are translated by the tables of `original_layout`. Configs are inferred from the tensors, or read from the
metadata of files that jaxdiff wrote. Tensors are read one at a time.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jaxdiff.config import (
    CLIPTextConfig,
    Config,
    ConfigError,
    PipelineOptions,
    SchedulerConfig,
    TinyVAEConfig,
    VAEConfig,
)
from jaxdiff.errors import WeightsError, say_once
from jaxdiff.io import cache, programs
from jaxdiff.io.configs import (
    NETWORKS,
    as_config_error,
    check_channels,
    check_dtype,
    check_prediction_type,
    example_image,
    module_shapes,
)
from jaxdiff.io.infer_config import (
    TEXTS,
    Shapes,
    as_weights_error,
    detect,
    has_vae,
    infer_configs,
    text_prefixes,
    vae_config,
)
from jaxdiff.io.model_paths import BUNDLED
from jaxdiff.io.original_layout import (
    SD3_CLIP,
    UNET_PREFIX,
    VAE_PREFIX,
    Place,
    Table,
    openclip_table,
    place,
    unet_table,
    vae_table,
)
from jaxdiff.io.strays import IGNORED, STRAY, drop_strays, warn_skipped
from jaxdiff.io.tensor_files import (
    TensorSource,
    check_tensors,
    load_tensors,
    named_tensors,
    open_tensors,
    write_tensors,
)
from jaxdiff.io.torch_names import tensor_name
from jaxdiff.io.transformer_layout import transformer_source
from jaxdiff.models.model import Model, build
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Params

METADATA = "jaxdiff"  # key in the file's metadata
PREFIXES = {
    "unet": UNET_PREFIX,
    "transformer": UNET_PREFIX,
    "vae": VAE_PREFIX,
}  # the text encoders' depend on the family
METADATA_CONFIGS: dict[str, type[Config]] = {
    **{name: cls for name, cls in NETWORKS.items() if name != "vision_encoder"},
    "scheduler": SchedulerConfig,
    "options": PipelineOptions,
    "low_res_scheduler": SchedulerConfig,
}


def load_single_file(
    path: str | Path,
    dtype: Any = None,
    remat: bool = False,
    mesh: Mesh | None = None,
    parts: Sequence[str] | None = None,
    **options: Any,
) -> tuple[Model, Params]:
    """The model of a one-file checkpoint and its parameters: see `load` and `open_single_file`."""
    model, sources = open_single_file(path, dtype, remat, **options)
    sources = {name: source for name, source in sources.items() if parts is None or name in parts}
    shapes = programs.shapes(model)
    return model, {
        name: load_tensors(source, shapes[name], model.denoising.dtype, mesh) for name, source in sources.items()
    }


def open_single_file(
    path: str | Path,
    dtype: Any = None,
    remat: bool = False,
    *,
    without_vae: bool = False,
    prediction_type: str | None = None,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Model, dict[str, TensorSource]]:
    """Open a one-file checkpoint of Stable Diffusion 1.x, 2.x, XL, XL's refiner, the x4 upscaler, or 3 without T5.

    Args:
        path: a file in any format that `open_tensors` reads.
        dtype: dtype of computation and parameters, "float32" by default.
        remat: recompute activations in the backward pass.
        without_vae: whether the file may lack an autoencoder, which is then not returned.
        prediction_type: "epsilon" or "v_prediction", which cannot be inferred. By default that of the published model:
            v for SD 2.x, except its inpainting and SD-Turbo, and for the upscaler. The 512-pixel base of SD 2.x needs
            "epsilon" here.
        configs: for models of unpublished shapes, config values that cannot be inferred:
            {"unet": {"attention_head_dim": 4, "norm_num_groups": 8}}; keys as in `params`, and "scheduler", "options".

    Returns:
        The model, and the unread tensors of each of its networks. Unused tensors are named in a warning.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and any tensor that is missing or unknown.
    """
    check_prediction_type(prediction_type)
    source, dtype = open_tensors(path), check_dtype(dtype)
    family = detect(source, without_vae=without_vae)
    is_sd3 = family == "sd3"
    source = _sd3_source(source) if is_sd3 else source
    saved = None if is_sd3 else _read_metadata(source)
    resolved, tokenizers = saved or (infer_configs(source, family, prediction_type), {})
    if prediction_type is not None:
        resolved["scheduler"] = resolved["scheduler"].with_prediction_type(prediction_type)
    with as_config_error(f"the configs of {source.path} do not make a model"):
        for name, values in (configs or {}).items():
            resolved[name] = dataclasses.replace(resolved[name], **values)
        for name in text_prefixes(source, family):
            key = name.replace("text_encoder", "tokenizer")
            tokenizers.setdefault(key, clip_tokenizer(resolved[name]))
        model = build(
            resolved.get("text_encoder"), None if is_sd3 else resolved["unet"], resolved["vae"],
            tokenizers.get("tokenizer"), resolved["scheduler"], text_2=resolved.get("text_encoder_2"),
            tokenizer_2=tokenizers.get("tokenizer_2"), transformer=resolved.get("transformer"),
            options=resolved["options"], dtype=dtype, remat=remat,
        )  # fmt: skip
        shapes = programs.shapes(model)
    check_channels(model, source.path)
    prefixes = PREFIXES | text_prefixes(source, family)
    shapes = {name: tree for name, tree in shapes.items() if name != "vae" or has_vae(source)}
    places: dict[str, dict[str, Place]] = {}
    for name, tree in [(name, tree) for name, tree in shapes.items() if name != "transformer"]:
        try:
            places[name] = _places(tree, name, model.modules[name].config, prefixes[name], source)
        except WeightsError:
            if name != "vae" or not without_vae:
                raise
            del shapes["vae"]  # incomplete, and another one takes its place
    sources = {name: _renamed(source, places[name]) for name in places}
    if is_sd3:
        sources["transformer"] = _transformer(source, shapes["transformer"])
        source = dataclasses.replace(
            source, shapes={n: s for n, s in source.shapes.items() if not n.startswith(UNET_PREFIX)}
        )
    _check_others(source, places, tuple(prefixes[name] for name in shapes), family)
    return model, {name: sources[name] for name in shapes}


def _sd3_source(source: TensorSource) -> TensorSource:
    """A checkpoint of Stable Diffusion 3 without its T5, which is skipped with a warning, as its tokenizer is missing.

    CLIP-L's pooled state is not projected in this layout: as in PyTorch diffusers, its projection is the identity,
    whatever the file holds.
    """
    prefix = TEXTS["sd3"]["text_encoder"]
    with as_weights_error(source):
        width = Shapes(source, f"{prefix}text_model.")["final_layer_norm.weight"][0]
    shapes = {name: shape for name, shape in source.shapes.items() if not name.startswith("text_encoders.t5xxl.")}
    if len(shapes) < len(source.shapes):
        say_once(
            f"{source.path}: T5 is left out, since no file of weights holds its tokenizer: to draw with it, give a "
            "diffusers folder of the model as --model, and this file as --transformer."
        )
    projection = f"{prefix}text_projection.weight"

    def read(name: str) -> np.ndarray:
        return np.eye(width, dtype=np.float32) if name == projection else source.read(name)

    return dataclasses.replace(source, shapes={**shapes, projection: [width, width]}, read=read)


def _transformer(source: TensorSource, target: Params) -> TensorSource:
    """The unread tensors of Stable Diffusion 3's transformer, with names and shapes checked."""
    renamed = transformer_source(source, "sd3", target)
    for path in flatten_dict(target):
        if (name := tensor_name(path)) not in renamed.shapes:
            raise WeightsError(f"{source.path} lacks the tensor {name} of the transformer: fetch the whole file again.")
    check_tensors(renamed, target)
    return renamed


def _check_others(
    source: TensorSource, places: dict[str, dict[str, Place]], prefixes: tuple[str, ...], family: str
) -> None:
    """Warn of unused tensors; raise WeightsError for those with the prefix of a network."""
    used = {location.name for network in places.values() for location in network.values()}
    averaged = [n for n in source.shapes if n.startswith("model_ema.")]
    partial = averaged if len(averaged) < len(places.get("unet", ())) else []
    unused = [n for n in source.shapes if n not in used and not IGNORED.fullmatch(n)]
    if "vae" not in places:
        unused = [n for n in unused if not n.startswith(VAE_PREFIX)]
    if unknown := sorted(n for n in unused if n.startswith(prefixes) and not STRAY.search(n)):
        raise WeightsError(
            f"{source.path} holds {len(unknown)} tensors that a model of the family {family} has no place for, first "
            f"{unknown[0]}."
        )
    has_controlnet = any(n.startswith("control_model.") for n in unused)
    note = " (a ControlNet: give the file to --controlnet too)" if has_controlnet else ""
    warn_skipped(source, unused + partial, note)


def clip_tokenizer(text: CLIPTextConfig) -> Tokenizer:
    """CLIP's tokenizer for a text encoder; OpenCLIP's encoders were trained with padding id 0, the token `!`."""
    tokenizer = Tokenizer.load(BUNDLED / "clip_tokenizer")
    files = dict(tokenizer.files)
    if text.hidden_act == "gelu":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            files[name] = json.dumps(json.loads(files[name]) | {"pad_token": "!"}, indent=2).encode()
    return Tokenizer(files, min(tokenizer.max_length, text.max_position_embeddings), cache.local_folder())


def _table(name: str, config: Any, prefix: str) -> Table | None:
    """The table of one network's names in the original layout; None if they equal ours."""
    if name == "unet":
        return unet_table(config)
    if name == "vae":
        return vae_table(config)
    if prefix in TEXTS["sd3"].values():
        return SD3_CLIP
    return openclip_table(config) if prefix.endswith(".model.") else None


def _places(
    params: Params, name: str, config: Any, prefix: str, source: TensorSource | None = None
) -> dict[str, Place]:
    """Our name of each of a network's tensors -> its place in the file, or in a file to be written if there is none."""
    table, places = _table(name, config, prefix), {}
    for path in flatten_dict(params):
        ours = tensor_name(path)
        location = Place(prefix + ours) if table is None else place(ours, table, prefix)
        if location is None:
            raise WeightsError(f"The original layout has no place for the {name}'s {ours}: save a folder instead.")
        if source is not None and location.name not in source.shapes:
            raise WeightsError(f"{source.path} lacks the tensor {location.name}: fetch the whole file again.")
        places[ours] = location
    return places


def _renamed(source: TensorSource, places: dict[str, Place]) -> TensorSource:
    """One network's tensors under our names and in diffusers' shapes."""

    def shape(location: Place) -> list[int]:
        size = list(source.shapes[location.name])
        if location.third is not None and size:
            size[0] //= 3
        if location.transposed:
            return size[::-1]
        return size[:2] if location.squeezed and set(size[2:]) == {1} else size

    def read(name: str) -> np.ndarray:
        location = places[name]
        x = source.read(location.name)
        if location.third is not None:
            rows = len(x) // 3
            x = x[location.third * rows : (location.third + 1) * rows]
        return x.T if location.transposed else x.reshape(shape(location)) if location.squeezed else x

    return TensorSource(source.path, {name: shape(location) for name, location in places.items()}, read)


def vae_like(inferred: VAEConfig, like: VAEConfig) -> VAEConfig:
    """An inferred config of an autoencoder, with the values that cannot be inferred from `like`."""
    not_inferred = ("act_fn", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor", "force_upcast")
    return dataclasses.replace(inferred, **{name: getattr(like, name) for name in not_inferred})


def original_vae(source: TensorSource, prefix: str, like: VAEConfig) -> tuple[VAEConfig, TensorSource]:
    """The config and the unread tensors of the autoencoder whose names start with `prefix` in the original layout.

    Args:
        like: the config of the autoencoder that it replaces, for values that cannot be inferred.
    """
    with as_weights_error(source):
        config = vae_like(vae_config(Shapes(source, prefix), "sd1"), like)
    shapes = module_shapes(AutoencoderKL(config), example_image, source.path)
    places = _places(shapes, "vae", config, prefix, source)
    used = {p.name for p in places.values()}
    is_checkpoint = any(name.startswith(UNET_PREFIX) for name in source.shapes)  # whose other parts are not strays
    unused = [n for n in source.shapes if n not in used and (n.startswith(prefix) or not is_checkpoint)]
    if unknown := sorted(drop_strays(source, unused, used, prefix)):
        raise WeightsError(
            f"{source.path} holds {len(unknown)} tensors that its autoencoder has no place for, first {unknown[0]}."
        )
    return config, _renamed(source, places)


def save_single_file(path: str | Path, model: Model, params: Params, dtype: Any = None) -> None:
    """Write a one-file checkpoint in the original layout, which other programs open too, atomically.

    The configs and tokenizers are stored in the metadata, so that models of any size can be loaded again.

    Args:
        path: must end in `.safetensors`.
        dtype: dtype of the tensors written; unchanged by default.

    Raises:
        WeightsError: it cannot be written, or the layout has no place for a part of the model.
    """
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise WeightsError(f"{path} does not end in .safetensors, the only format written: rename it.")
    if model.is_gan:
        raise WeightsError("A single file cannot hold a GAN: save a folder.")
    if model.transformer is not None:
        raise WeightsError("A single file cannot hold a model with a transformer: save a folder.")
    if model.controlnets:
        raise WeightsError("A single file cannot hold ControlNets: save a folder, or leave them out of params.")
    if isinstance(model.vae.config, TinyVAEConfig):
        raise WeightsError("A single file cannot hold a tiny autoencoder: save a folder, or load a large one first.")
    if model.vision_encoder is not None:
        raise WeightsError("A single file cannot hold a vision encoder: save a folder, or the model without it.")
    dtype, tensors = None if dtype is None else check_dtype(dtype), {}
    texts = TEXTS["sd2" if model.family == "upscaler" else model.family]
    for name, prefix in ({n: PREFIXES[n] for n in ("unet", "vae")} | texts).items():
        places = _places(params[name], name, model.modules[name].config, prefix)
        thirds: dict[str, dict[int, np.ndarray]] = {}
        for ours, x in named_tensors(params[name], dtype):
            location = places[ours]
            if location.third is not None:
                thirds.setdefault(location.name, {})[location.third] = x
            else:
                tensors[location.name] = x.T if location.transposed else x[..., None, None] if location.squeezed else x
        tensors |= {name: np.concatenate([x[i] for i in range(3)]) for name, x in thirds.items()}
    if model.text_encoder_2 is not None and model.scheduler.prediction_type == "v_prediction":
        tensors["v_pred"] = np.zeros(0, np.float32)  # by convention, empty tensors mark such SDXL models
        if model.scheduler.rescale_betas_zero_snr:
            tensors["ztsnr"] = np.zeros(0, np.float32)
    write_tensors(path, tensors, {METADATA: json.dumps(_metadata(model))})


def _metadata(model: Model) -> dict[str, Any]:
    values: dict[str, Any] = {name: module.config.to_dict() for name, module in model.modules.items()}
    values["scheduler"] = model.scheduler.to_dict()
    values["options"] = dataclasses.asdict(dataclasses.replace(model.options, low_res_scheduler=None))
    if model.options.low_res_scheduler is not None:
        values["low_res_scheduler"] = model.options.low_res_scheduler.to_dict()
    for name, text in (("tokenizer", model.text_encoder), ("tokenizer_2", model.text_encoder_2)):
        tokenizer = getattr(model, name)
        if text is not None and tokenizer is not None and tokenizer != clip_tokenizer(text.config):
            files = {n: data.decode("utf-8") for n, data in tokenizer.files.items()}
            values[name] = {"files": files, "max_length": tokenizer.max_length}
    return values


def _read_metadata(source: TensorSource) -> tuple[dict[str, Any], dict[str, Tokenizer]] | None:
    """The configs and tokenizers that `save_single_file` stored in the file; None if it did not."""
    if METADATA not in source.metadata:
        return None
    try:
        values = json.loads(source.metadata[METADATA])
        configs: dict[str, Any] = {n: cls.from_dict(values[n]) for n, cls in METADATA_CONFIGS.items() if n in values}
        low_res = configs.pop("low_res_scheduler", None)
        configs["options"] = dataclasses.replace(configs["options"], low_res_scheduler=low_res)
        tokenizers = {n: _tokenizer(values[n]) for n in ("tokenizer", "tokenizer_2") if n in values}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"the configs in the metadata of {source.path} are damaged ({e}): fetch it again.") from None
    return configs, tokenizers


def _tokenizer(values: dict[str, Any]) -> Tokenizer:
    files = {name: text.encode("utf-8") for name, text in values["files"].items()}
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(files).save(folder)
        return dataclasses.replace(Tokenizer.load(folder), max_length=int(values["max_length"]))
