"""The model that a run starts from: fresh networks, or parts of earlier stages and published models."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import CLIPTextConfig, ConfigError, PipelineOptions, SchedulerConfig, TinyVAEConfig, VAEConfig
from jaxdiff.io.configs import FRESH, read_config, replace_config
from jaxdiff.io.diffusers_folder import INDEX, load_model
from jaxdiff.io.model_paths import find
from jaxdiff.io.modules import CONFIG, find_weights, load_tokenizer
from jaxdiff.io.pretrained import load
from jaxdiff.io.single_file import open_single_file
from jaxdiff.io.tensor_files import TensorSource, load_tensors
from jaxdiff.io.transformer_folder import text_widths
from jaxdiff.io.vae import is_vae, open_vae
from jaxdiff.models.model import Model, autoencoder, build, encode, init_params, param_shapes
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.training.ranges import naming
from jaxdiff.typing import Key, Params

PARTS = ("text_encoder", "text_encoder_2", "unet", "transformer", "vae", "vision_encoder")
INIT_FROM_PARTS = tuple(name for name in PARTS if name != "transformer")  # settings of init_from


def starting_model(
    sizes: Mapping[str, Mapping[str, Any]],
    init_from: Mapping[str, str],
    make_tokenizer: Callable[[], Tokenizer],
    key: Key,
    *,
    dtype: Any = "float32",
    remat: bool | str = False,
    check: Callable[[Model], None] | None = None,
) -> tuple[Model, Params]:
    """The model that training starts from.

    Args:
        sizes: the config of each fresh part ("text_encoder", "unet", "vae", "vision_encoder") and of the "scheduler". A
            "transformer", of SD 3's kind, takes the place of a UNet and reads two text encoders.
        init_from: for each part that is loaded, with config and weights, a model (diffusers folder, single file or
            name), the folder of that part alone, or for "vae" whatever `jaxdiff.load_vae` opens. "model" stands for
            all parts, and given alone may be of any family. The tokenizer comes with the text encoder, the scheduler
            with "model" alone.
        make_tokenizer: makes the tokenizer of a fresh text encoder.
        key: for the fresh parameters.
        check: called with the model before weights are read; may raise to refuse it.

    Returns:
        The model and its float32 parameters as numpy arrays, which use no device memory.

    Raises:
        ConfigError, WeightsError: one sentence naming the entry or file.
    """
    if [name for name, folder in init_from.items() if folder] == ["model"]:
        return _load(init_from["model"], dtype, remat, check)
    model, parts = _describe(sizes, init_from, make_tokenizer, dtype, remat)
    if check is not None:
        check(model)
    shapes = param_shapes(model)
    loaded = {}
    for name, part in parts.items():
        with naming(f"init_from.{name if init_from.get(name) else 'model'}"):
            loaded[name] = part.read(shapes[name])
    return model, {**_init_parts(model, set(shapes) - set(parts), key), **jax.device_get(loaded)}


def described_model(
    sizes: Mapping[str, Mapping[str, Any]],
    init_from: Mapping[str, str],
    make_tokenizer: Callable[[], Tokenizer],
    *,
    dtype: Any = "float32",
    remat: bool | str = False,
) -> Model:
    """The model of `starting_model`, from configs and vocabularies; no weights are read."""
    if [name for name, folder in init_from.items() if folder] != ["model"]:
        return _describe(sizes, init_from, make_tokenizer, dtype, remat)[0]
    return _with_dtype(_open("model", init_from["model"])[0], dtype, remat)


class _Part(NamedTuple):
    """A network that is loaded rather than initialized."""

    config: Any
    weights: Callable[[], Path | TensorSource]  # locates the weights without reading them
    tokenizer: Tokenizer | None = None
    projects: bool = True  # False: a text encoder that gets the identity as its projection

    def read(self, shapes: Params) -> Params:
        """The parameters, float32."""
        if self.projects:
            return load_tensors(self.weights(), shapes, jnp.float32)
        read_shapes = {name: tree for name, tree in shapes.items() if name != "text_projection"}
        identity = {"kernel": jnp.eye(self.config.hidden_size)}
        return {**load_tensors(self.weights(), read_shapes, jnp.float32), "text_projection": identity}


def _describe(sizes, init_from, make_tokenizer, dtype, remat) -> tuple[Model, dict[str, _Part]]:
    """The model, and its parts that are loaded."""
    paths = {name: path for name, path in init_from.items() if path}
    if unknown := [name for name in paths if name not in ("model", *INIT_FROM_PARTS)]:
        raise ConfigError(f"init_from.{unknown[0]} is unknown; known are model, {', '.join(INIT_FROM_PARTS)}.")
    is_sd3 = "transformer" in sizes
    scheduler_class = "FlowMatchEulerDiscreteScheduler" if is_sd3 else "DDIMScheduler"
    scheduler = SchedulerConfig.from_dict({"_class_name": scheduler_class, **sizes.get("scheduler", {})})
    parts: dict[str, _Part] = {}
    if "model" in paths:
        source_model, parts = _open("model", paths.pop("model"))
        scheduler = scheduler if is_sd3 else source_model.scheduler
    configs: dict[str, Any] = {name: FRESH[name].from_dict(dict(sizes[name])) for name in PARTS if name in sizes}
    for name, path in paths.items():
        vae_config = parts["vae"].config if "vae" in parts else configs.get("vae", VAEConfig())
        parts[name] = _part(name, path, vae_config)
    configs.update({name: part.config for name, part in parts.items() if name in PARTS})
    text_names = ("text_encoder", "text_encoder_2") if is_sd3 else ("text_encoder",)
    if missing := [name for name in (*text_names, "transformer" if is_sd3 else "unet", "vae") if name not in configs]:
        raise ConfigError(f"The config gives neither model.{missing[0]} nor init_from.{missing[0]}.")
    if is_sd3:
        configs, parts = _as_sd3(configs, parts)
    _check_fit(configs)
    tokenizers = [parts[name].tokenizer if name in parts else None for name in text_names]
    if None in tokenizers:
        new_tokenizer = make_tokenizer()
        for name, tokenizer in zip(text_names, tokenizers, strict=True):
            if tokenizer is None:
                configs[name] = _fit_tokenizer(configs[name], new_tokenizer)
        tokenizers = [tokenizer or new_tokenizer for tokenizer in tokenizers]
    second: dict[str, Any] = {"text_2": configs["text_encoder_2"], "tokenizer_2": tokenizers[-1]} if is_sd3 else {}
    return build(
        configs["text_encoder"], configs["unet"], configs["vae"], tokenizers[0], scheduler,
        configs.get("vision_encoder"), transformer=configs.get("transformer"), dtype=dtype, remat=remat, **second,
        options=PipelineOptions(max_sequence_length=0) if is_sd3 else None,  # no T5
    ), parts  # fmt: skip


def _as_sd3(configs: dict[str, Any], parts: dict[str, _Part]) -> tuple[dict[str, Any], dict[str, _Part]]:
    """The parts as SD 3's pipeline needs them, without a UNet.

    Its text encoders have a projection of the pooled text (the identity is added), and its autoencoder has a shift.
    """
    changed = {**configs, "unet": None}
    for name in ("text_encoder", "text_encoder_2"):
        if not (text := configs[name]).with_projection:
            changed[name] = dataclasses.replace(text, with_projection=True, projection_dim=text.hidden_size)
    changed["vae"] = dataclasses.replace(configs["vae"], shift_factor=configs["vae"].shift_factor or 0.0)
    return changed, {
        name: part._replace(config=changed[name], projects=name == "vae" or part.config == changed[name])
        for name, part in parts.items()
        if changed.get(name) is not None
    }


def _load(path: str, dtype: Any, remat: bool | str, check: Callable[[Model], None] | None) -> tuple[Model, Params]:
    """A model of any family with float32 parameters, which computes in `dtype`."""
    if check is not None:
        check(_open("model", path)[0])
    with naming("init_from.model"):
        model, params = load(find(path))
    return _with_dtype(model, dtype, remat), jax.device_get(params)


def _with_dtype(model: Model, dtype: Any, remat: bool | str) -> Model:
    """The same model, with its ControlNets, computing in `dtype`."""
    dtype = jnp.dtype(dtype)
    modules = {name: module.copy(dtype=dtype, remat=remat) for name, module in model.modules.items()}
    modules["vae"] = autoencoder(model.vae.config, dtype, remat)  # which may compute in float32 nevertheless
    controlnets = tuple(net.copy(dtype=dtype, remat=remat) for net in model.controlnets)
    return dataclasses.replace(model, **modules, controlnets=controlnets)


def _init_parts(model: Model, names: set[str], key: Key) -> Params:
    """Fresh parameters of these parts."""
    # Hundreds of small kernels that run once: on a CPU, optimising them takes longer than it saves.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def init(key: Key) -> Params:  # jit drops the parameters that are not returned
        return {name: x for name, x in init_params(model, key).items() if name in names}

    return jax.device_get(jax.jit(init, compiler_options=options)(key)) if names else {}


def _open(name: str, path: str) -> tuple[Model, dict[str, _Part]]:
    """The model of an entry of init_from, and its parts; no weights are read."""
    with naming(f"init_from.{name}"):
        location = find(path)
        if location.is_file():
            model, sources = open_single_file(location)
            weights: dict[str, Callable[[], Path | TensorSource]] = {
                part: functools.partial(lambda source: source, source) for part, source in sources.items()
            }
        else:
            model = load_model(location)
            weights = {part: functools.partial(find_weights, location / part, part) for part in model.modules}
    tokenizers = {"text_encoder": model.tokenizer, "text_encoder_2": model.tokenizer_2}
    modules = model.modules
    return model, {part: _Part(modules[part].config, source, tokenizers.get(part)) for part, source in weights.items()}


def _part(name: str, path: str, vae_config: VAEConfig | TinyVAEConfig) -> _Part:
    """One part, from a folder or file of its own or from a complete model."""
    folder = Path(path)
    with naming(f"init_from.{name}"):
        if name == "vae" and is_vae(folder):
            vae, source = open_vae(folder, vae_config)
            return _Part(vae, lambda: source)
        if (folder / CONFIG).is_file() and not (folder / INDEX).is_file():  # as diffusers' save_pretrained writes it
            config: Any = read_config(folder / CONFIG, FRESH[name])
            tokenizer = None
            if name.startswith("text_encoder"):
                tokenizer_name = "tokenizer_2" if folder.name == "text_encoder_2" else "tokenizer"
                tokenizer = load_tokenizer(folder.parent / tokenizer_name, config)
            return _Part(config, lambda: find_weights(folder, name), tokenizer)
    parts = _open(name, path)[1]
    if name == "text_encoder_2" and name not in parts:  # use the only text encoder twice
        return parts["text_encoder"]
    if name not in parts:
        raise ConfigError(f"--config.init_from.{name}: {path} has no {name}.")
    return parts[name]


def _fit_tokenizer(config: CLIPTextConfig, tokenizer: Tokenizer) -> CLIPTextConfig:
    """The text encoder's config with the ids and lengths of the tokenizer."""
    return CLIPTextConfig.from_dict(
        {
            **config.to_dict(),
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": tokenizer.max_length,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    )


def _check_fit(configs: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the parts fit each other."""
    text, unet, vae = (configs[name] for name in ("text_encoder", "unet", "vae"))
    if unet is None:
        _check_transformer(configs)
        return
    if unet.cross_attention_dim != text.hidden_size:
        raise ConfigError(
            f"unet.cross_attention_dim is {unet.cross_attention_dim}, the text encoder's hidden_size "
            f"{text.hidden_size}: make them equal."
        )
    if unet.in_channels != vae.latent_channels:
        raise ConfigError(
            f"unet.in_channels is {unet.in_channels}, the autoencoder has {vae.latent_channels} latent channels; "
            "only plain text-to-image models can be trained."
        )
    if unet.addition_embed_type or unet.class_embed_type or unet.num_class_embeds:
        raise ConfigError("The UNet wants more than a prompt (SDXL, upscaling); only plain ones can be trained.")


def _check_transformer(configs: Mapping[str, Any]) -> None:
    """`_check_fit` of a transformer."""
    transformer, vae = configs["transformer"], configs["vae"]
    for name, width, expected in text_widths("sd3", {**configs, "text_encoder_3": None}):
        if width != expected:
            raise ConfigError(f"transformer.{name} is {width}, and the text encoders make {expected}: make them equal.")
    if not transformer.in_channels == transformer.out_channels == vae.latent_channels:
        raise ConfigError(
            f"transformer.in_channels and out_channels are {transformer.in_channels} and {transformer.out_channels}, "
            f"the autoencoder has {vae.latent_channels} latent channels: make them equal."
        )


def with_measured_scaling(model: Model, params: Params, images: Iterable[np.ndarray]) -> Model:
    """The model with the autoencoder's scaling_factor set so that latents have unit deviation over these images.

    (Rombach et al. 2022, appendix G.) The deviation is taken over all elements, mean included.

    Args:
        images: batches uint8 [B, H, W, 3].
    """
    encode_batch = jax.jit(
        lambda vae, images: encode(
            replace_config(model, "vae", scaling_factor=1.0), {"vae": vae}, images.astype(jnp.float32) / 255.0
        )
    )
    vae = jax.device_put(params["vae"])
    latents = np.concatenate([np.asarray(encode_batch(vae, batch)).ravel() for batch in images]).astype(np.float64)
    return replace_config(model, "vae", scaling_factor=float(np.round(1.0 / latents.std(), 5)))
