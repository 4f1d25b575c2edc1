"""What a run starts from: a model of given sizes, some of whose parts come from folders of earlier stages."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import CLIPTextConfig, ConfigError, SchedulerConfig
from jaxdiff.data.buckets import Buckets, assign, bucket_sizes
from jaxdiff.data.filters import scan
from jaxdiff.data.source import Source
from jaxdiff.io.configs import NETWORKS, VAES, read_config, replace_config
from jaxdiff.io.diffusers_folder import load_model
from jaxdiff.io.model_paths import find
from jaxdiff.io.modules import find_weights
from jaxdiff.io.pretrained import load
from jaxdiff.io.tensor_files import load_tensors
from jaxdiff.models.model import Model, autoencoder, build, encode, init_params, param_shapes
from jaxdiff.text.tokenizer import Tokenizer, train_bpe
from jaxdiff.typing import Key, Params

MAX_CAPTIONS = 1_000_000  # examples that a tokenizer is learnt from
PARTS = ("text_encoder", "unet", "vae", "vision_encoder")


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
        sizes: the config of each fresh part ("text_encoder", "unet", "vae", "vision_encoder") and of the "scheduler".
        init_from: diffusers folders, or names of bundled models, by the part that is taken from them, config and
            weights; for "vae" also the folder of an autoencoder alone. "model" stands for all parts that the folder
            has, and without others beside it may be of any family or a single file. The tokenizer comes with the text
            encoder, the scheduler with "model" alone.
        make_tokenizer: makes one where the text encoder is fresh.
        key: of the fresh parameters.
        check: is called with the model before any weights are read (of a single file, after), to refuse it.

    Returns:
        The model and its float32 parameters as numpy arrays, which take no memory of a device.

    Raises:
        ConfigError, WeightsError: one sentence naming the entry or file.
    """
    if [name for name, folder in init_from.items() if folder] == ["model"]:
        return _whole(init_from["model"], dtype, remat, check)
    model, given = _described(sizes, init_from, make_tokenizer, dtype, remat)
    if check is not None:
        check(model)
    shapes = param_shapes(model)
    read = {
        name: load_tensors(find_weights(folder, name), shapes[name], jnp.float32) for name, (folder, _) in given.items()
    }
    return model, {**_fresh(model, set(shapes) - set(given), key), **jax.device_get(read)}


def described_model(
    sizes: Mapping[str, Mapping[str, Any]],
    init_from: Mapping[str, str],
    make_tokenizer: Callable[[], Tokenizer],
    *,
    dtype: Any = "float32",
    remat: bool | str = False,
) -> Model:
    """The model of `starting_model` alone: configs and vocabularies are read, no weights."""
    if [name for name, folder in init_from.items() if folder] != ["model"]:
        return _described(sizes, init_from, make_tokenizer, dtype, remat)[0]
    return _rebuilt(_open("model", init_from["model"])[1], dtype, remat)


def _described(sizes, init_from, make_tokenizer, dtype, remat) -> tuple[Model, dict[str, tuple[Path, Any]]]:
    """The model, and of each part that is not fresh its own folder and the model or single network that it is of."""
    given = {name: _open(name, folder) for name, folder in init_from.items() if folder}
    scheduler = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **sizes.get("scheduler", {})})
    if "model" in given:
        folder, whole = given.pop("model")
        given = {**{name: (folder / name, whole) for name in whole.modules}, **given}
        scheduler = whole.scheduler
    configs: dict[str, Any] = {name: NETWORKS[name].from_dict(dict(sizes[name])) for name in PARTS if name in sizes}
    configs.update({name: source.modules[name].config for name, (_, source) in given.items()})
    if missing := [name for name in ("text_encoder", "unet", "vae") if name not in configs]:
        raise ConfigError(f"The config gives neither model.{missing[0]} nor init_from.{missing[0]}.")
    _check_fit(configs)
    if "text_encoder" in given:
        tokenizer = given["text_encoder"][1].tokenizer
    else:
        tokenizer = make_tokenizer()
        configs["text_encoder"] = _fit_tokenizer(configs["text_encoder"], tokenizer)
    text, unet, vae = (configs[name] for name in ("text_encoder", "unet", "vae"))
    vision = configs.get("vision_encoder")
    return build(text, unet, vae, tokenizer, scheduler, vision, dtype=dtype, remat=remat), given


def _whole(path: str, dtype: Any, remat: bool | str, check: Callable[[Model], None] | None) -> tuple[Model, Params]:
    """A model of any family as it is, with float32 parameters, that computes in `dtype`."""
    try:
        found = find(path)
    except ConfigError as e:
        raise ConfigError(f"init_from.model: {e}") from None
    if check is not None and found.is_dir():
        check(load_model(found))
    m, params = load(found)
    if check is not None and not found.is_dir():  # whose tensors tell the configs
        check(m)
    return _rebuilt(m, dtype, remat), jax.device_get(params)


def _rebuilt(m: Model, dtype: Any, remat: bool | str) -> Model:
    """The same model, ControlNets and all, that computes in `dtype`."""
    text = m.text_encoder.config if m.text_encoder else None
    text_2 = m.text_encoder_2.config if m.text_encoder_2 else None
    vision = m.vision_encoder.config if m.vision_encoder else None
    more: Any = {"text_2": text_2, "tokenizer_2": m.tokenizer_2, "options": m.options, "dtype": dtype, "remat": remat}
    made = build(text, m.unet.config, m.vae.config, m.tokenizer, m.scheduler, vision, **more)
    nets = tuple(net.copy(dtype=made.unet.dtype, remat=remat) for net in m.controlnets)
    return dataclasses.replace(made, controlnets=nets, tiny_vae=m.tiny_vae)


def _fresh(model: Model, names: set[str], key: Key) -> Params:
    """Fresh parameters of these parts."""
    # Some hundred small kernels run once: on a CPU, optimising them costs more than it saves.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def init(key: Key) -> Params:  # under jit what is not asked for is not computed
        return {name: x for name, x in init_params(model, key).items() if name in names}

    return jax.device_get(jax.jit(init, compiler_options=options)(key)) if names else {}


class _Alone(NamedTuple):
    """In the place of a model: one network, out of a folder of its own."""

    modules: Mapping[str, Any]


def _open(name: str, folder: str) -> tuple[Path, Any]:
    """The folder of an entry of init_from, and its model: the part's own folder, or for "model" the whole one's."""
    if name != "model" and name not in PARTS:
        raise ConfigError(f"init_from.{name} is unknown; known are model, {', '.join(PARTS)}.")
    try:
        path = find(folder)
    except ConfigError as e:
        raise ConfigError(f"init_from.{name}: {e}") from None
    if path.is_file():
        raise ConfigError(
            f"init_from.{name}: {folder} is one file, which is opened as a whole: for --plan, or beside other parts, "
            "save it as a folder with jaxdiff.save."
        )
    if name == "vae" and (path / "config.json").is_file():  # as diffusers' AutoencoderKL.save_pretrained writes it
        config: Any = read_config(path / "config.json", *VAES)
        return path, _Alone({name: autoencoder(config, jnp.float32)})
    model = load_model(path)
    if name == "model":
        return path, model
    if name not in model.modules:
        raise ConfigError(f"init_from.{name}: the folder {folder} has no {name}.")
    return path / name, model


def _fit_tokenizer(text: CLIPTextConfig, tokenizer: Tokenizer) -> CLIPTextConfig:
    """The text encoder's config with the ids and lengths of the tokenizer."""
    return CLIPTextConfig.from_dict(
        {
            **text.to_dict(),
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


def measured(model: Model, params: Params, images: Iterable[np.ndarray]) -> Model:
    """The model with the autoencoder's scaling_factor set so that latents have unit deviation over these images.

    (Rombach et al. 2022, appendix G.) The deviation is taken over all elements, mean included.

    Args:
        images: batches uint8 [B, H, W, 3].
    """
    run = jax.jit(
        lambda vae, images: encode(
            replace_config(model, "vae", scaling_factor=1.0), {"vae": vae}, images.astype(jnp.float32) / 255.0
        )
    )
    vae = jax.device_put(params["vae"])
    latents = np.concatenate([np.asarray(run(vae, batch)).ravel() for batch in images]).astype(np.float64)
    return replace_config(model, "vae", scaling_factor=float(np.round(1.0 / latents.std(), 5)))


def buckets(source: Source, data: Mapping[str, Any], image_size: int, cache: Path, **hosts: Any) -> Buckets | None:
    """The sizes that the images of a source are cut to, by their aspect ratios; None where all become squares.

    Raises:
        ConfigError: `data.buckets` that no size is a multiple of.
    """
    if not data["buckets"]:
        return None
    sizes = bucket_sizes(image_size, data["buckets"], data["max_aspect"])
    found = scan(source, sizes=True, cache=cache, **hosts)
    return Buckets(sizes, assign(sizes, found["width"], found["height"]))


def corpus_tokenizer(source: Source, vocab_size: int, max_length: int, extra: Iterable[str]) -> Tokenizer:
    """A tokenizer learnt from the captions of a source and some more texts, such as the names of backgrounds."""
    captions: list[str] = []
    for i in range(0, len(source), -(-len(source) // MAX_CAPTIONS)):
        with contextlib.suppress(ValueError, OSError):  # a damaged example is named when it comes up in training
            captions += source.read(i, image=False).captions
    return train_bpe([*captions, *extra], vocab_size, max_length)
