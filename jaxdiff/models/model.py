"""A whole text-to-image model as one static value, and the pure functions of its encoders and decoder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    PipelineOptions,
    SchedulerConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.conditioning import Conditioning, encode_chunks
from jaxdiff.models.controlnet import check_fits
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.text.chunks import Tokens
from jaxdiff.text.emphasis import apply_emphasis
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Array, Key, Params

AESTHETIC_SCORE = 6.0  # the score that the SDXL refiner is asked for


@dataclasses.dataclass(frozen=True)
class Model:
    """Networks, their configs and the tokenizers; hashable, hence static under `jit`. Holds no parameters."""

    text_encoder: CLIPTextModel | None  # None: the SDXL refiner, which has only text_encoder_2
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: Tokenizer | None
    scheduler: SchedulerConfig
    vision_encoder: CLIPVisionModel | None = None  # for contrastive training and scoring; not for drawing
    text_encoder_2: CLIPTextModel | None = None  # SDXL: OpenCLIP's, with a projection
    tokenizer_2: Tokenizer | None = None
    controlnets: tuple[Any, ...] = ()  # their parameters are the list params["controlnet"], in the same order
    tiny_vae: AutoencoderTiny | None = None  # draws previews, with params["tiny_vae"]
    options: PipelineOptions = dataclasses.field(default_factory=PipelineOptions)

    @property
    def modules(self) -> dict:
        """The Flax modules by their key in `params`, without ControlNets."""
        names = ("text_encoder", "text_encoder_2", "unet", "vae", "vision_encoder")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def family(self) -> str:
        """Which Stable Diffusion this is built like: "sd1", "sd2", "sdxl", "sdxl_refiner" or "upscaler".

        Inpainting and distilled models (`unet.config.time_cond_proj_dim`) exist in any family.
        """
        if self.text_encoder_2 is not None:
            return "sdxl_refiner" if self.text_encoder is None else "sdxl"
        if self.unet.config.num_class_embeds is not None:
            return "upscaler"
        # ViT-L of SD 1.x has quick_gelu, OpenCLIP's encoders of SD 2.x the exact gelu.
        return "sd2" if self.text_encoder is not None and self.text_encoder.config.hidden_act == "gelu" else "sd1"

    @property
    def inpaints(self) -> bool:
        """Whether the UNet was trained for inpainting: its input also holds a mask and the masked image's latents."""
        return self.unet.config.in_channels == 2 * self.vae.config.latent_channels + 1


def computing_in(model: Model, dtype: Any) -> Model:
    """The model with networks that compute in another type; its parameters may have any."""
    networks = {name: module.clone(dtype=jnp.dtype(dtype)) for name, module in model.modules.items()}
    controlnets = tuple(module.clone(dtype=jnp.dtype(dtype)) for module in model.controlnets)
    tiny = model.tiny_vae and model.tiny_vae.clone(dtype=jnp.dtype(dtype))
    return dataclasses.replace(model, **networks, controlnets=controlnets, tiny_vae=tiny)


def with_controlnets(model: Model, params: Params, *controlnets: tuple[Any, Params]) -> tuple[Model, Params]:
    """The model with these ControlNets instead of its own; each is (module, params), as `load_controlnet` returns it.

    `generate` takes their control images in the same order.

    Raises:
        ConfigError: a ControlNet was trained for a UNet of another shape.
    """
    for net, _ in controlnets:
        check_fits(net.config, model.unet.config)
    model = dataclasses.replace(model, controlnets=tuple(net for net, _ in controlnets))
    return model, {**params, "controlnet": [p for _, p in controlnets]}


def build(
    text: CLIPTextConfig | None,
    unet: UNetConfig,
    vae: VAEConfig | TinyVAEConfig,
    tokenizer: Tokenizer | None,
    scheduler: SchedulerConfig,
    vision: CLIPVisionConfig | None = None,
    *,
    text_2: CLIPTextConfig | None = None,
    tokenizer_2: Tokenizer | None = None,
    options: PipelineOptions | None = None,
    dtype=jnp.float32,
    remat: bool | str = False,
) -> Model:
    """A model from its configs.

    Args:
        text, text_2, vision: None for an encoder that the model lacks.
        dtype: type that the networks compute in.
        remat: whether the backward pass recomputes activations, or a policy; see `rematerialised`.
    """
    dtype = jnp.dtype(dtype)
    rest = remat, dtype
    return Model(
        None if text is None else CLIPTextModel(text, *rest),
        UNet2DConditionModel(unet, *rest),
        autoencoder(vae, dtype, remat),
        tokenizer,
        scheduler,
        None if vision is None else CLIPVisionModel(vision, *rest),
        None if text_2 is None else CLIPTextModel(text_2, *rest),
        tokenizer_2,
        options=options or PipelineOptions(),
    )


def autoencoder(
    config: VAEConfig | TinyVAEConfig, dtype: Any, remat: bool | str = False
) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder of a config. AutoencoderKL computes in float32 where its config says that float16 overflows."""
    if isinstance(config, TinyVAEConfig):
        return AutoencoderTiny(config, bool(remat), dtype)
    upcast = config.force_upcast and dtype == jnp.float16
    return AutoencoderKL(config, remat, jnp.dtype("float32") if upcast else dtype)


def example_inputs(model: Model) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
    """The smallest inputs of each module, by its key in `params`; the parameters' shapes do not depend on them."""
    unet, vae = model.unet.config, model.vae.config

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    side = 2 ** (len(unet.block_out_channels) - 1)
    tokens = (array(1, 2, dtype=jnp.int32),)
    inputs: dict[str, tuple] = {n: tokens for n in model.modules if n.startswith("text_encoder")}
    inputs |= {
        "unet": (array(1, side, side, unet.in_channels), array(1), array(1, 2, unet.cross_attention_dim)),
        "vae": (array(1, vae.factor, vae.factor, vae.in_channels),),
    }
    extra: list[jax.ShapeDtypeStruct | None] = [None] * 5  # pooled, time_ids, attention_mask, class_labels, guidance
    if unet.addition_embed_type == "text_time":
        assert unet.projection_class_embeddings_input_dim  # `UNetConfig.from_dict` sees to it
        assert unet.addition_time_embed_dim
        ids = time_id_count(model)
        pooled = unet.projection_class_embeddings_input_dim - ids * unet.addition_time_embed_dim
        extra[:2] = array(1, pooled), array(1, ids)
    if unet.class_embed_type is None and unet.num_class_embeds is not None:
        extra[3] = array(1, dtype=jnp.int32)
    elif unet.class_embed_type is not None:
        wide = {"identity": 4 * unet.block_out_channels[0], "timestep": None}
        width = wide.get(unet.class_embed_type, unet.projection_class_embeddings_input_dim)
        extra[3] = array(1) if width is None else array(1, width)
    if unet.time_cond_proj_dim is not None:
        extra[4] = array(1, unet.time_cond_proj_dim)
    inputs["unet"] += tuple(extra)
    if model.vision_encoder is not None:
        size = model.vision_encoder.config.image_size
        inputs["vision_encoder"] = (array(1, size, size, 3),)
    return inputs


def time_id_count(model: Model) -> int:
    """How many time ids the UNet takes: sizes and crop; the refiner has one score instead of the target size."""
    return 5 if model.options.requires_aesthetics_score else 6


def init_params(model: Model, key: Key) -> Params:
    """Fresh float32 parameters of every module: {"text_encoder": …, "unet": …, "vae": …}."""
    params = {}
    for i, (name, shapes) in enumerate(example_inputs(model).items()):
        zeros = [s if s is None else jnp.zeros(s.shape, s.dtype) for s in shapes]
        params[name] = model.modules[name].init(jax.random.fold_in(key, i), *zeros)["params"]
    return params


def param_shapes(model: Model) -> Params:
    """The tree of `init_params` as shapes and types, without allocating anything."""
    found = {name: _module_shapes(model.modules[name], x) for name, x in sorted(example_inputs(model).items())}
    return jax.tree.map(lambda x: x, found)  # a tree of the caller's own


@functools.lru_cache(maxsize=64)
def _module_shapes(module: Any, inputs: tuple[jax.ShapeDtypeStruct | None, ...]) -> Params:
    """Shapes of one module's parameters, cached: tracing a network of full size takes a second or two."""
    return jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *inputs)


def apply(model: Model, params: Params, name: str, *args: Any, method: str | None = None) -> Any:
    """The output of one module, named by its key in `params`, with its own parameters."""
    return model.modules[name].apply({"params": params[name]}, *args, method=method)


def encode_text(model: Model, params: Params, tokens: Tokens | Array, *, clip_skip: int = 0) -> Conditioning:
    """Token ids to what the UNet is told of the prompts.

    One encoder (SD 1.x, 2.x) gives its last hidden state after the final norm. SDXL takes the state before the last,
    without the norm, of its two encoders side by side, and the refiner that of its only one; their pooled text is the
    last encoder's projection of the first chunk (Podell et al. 2023, section 2.1).

    Args:
        tokens: `Tokens`, or for a model of one encoder token ids, int32 [B, L] or [B, K L] in K chunks.
        clip_skip: last layers to skip, at least 0.

    Returns:
        embeddings [B, K L, D], the tokens' attention mask [B, K L] or None and, for SDXL, pooled [B, P]; no time ids.

    Raises:
        ValueError: `clip_skip` is negative or leaves no layer, or `tokens` lack the ids of the second encoder.
    """
    tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
    given = ((tokens.ids, tokens.weights), (tokens.ids_2, tokens.weights_2))
    names = [n for n in ("text_encoder", "text_encoder_2") if n in model.modules]
    sdxl = names[-1] == "text_encoder_2"  # or its refiner
    embeddings, pooled = [], None
    for name, (ids, weights) in zip(names, given, strict=False):
        if ids is None:
            raise ValueError("tokens are for one text encoder, this model has two: make them with jaxdiff.tokenize.")
        encoder, tokenizer = model.modules[name], model.tokenizer if name == "text_encoder" else model.tokenizer_2
        length = encoder.config.max_position_embeddings if tokenizer is None else tokenizer.max_length
        states, pooled = encode_chunks(encoder, params[name], ids, length, clip_skip, sdxl)
        embeddings.append(apply_emphasis(states, weights, length))
    cond = Conditioning(jnp.concatenate(embeddings, -1), pooled if sdxl else None, None, tokens.attention_mask)
    if tokens.zeros is None:
        return cond
    zeros = jnp.asarray(tokens.zeros)
    return cond._replace(
        embeddings=jnp.where(zeros[:, None, None], 0, cond.embeddings),
        pooled=None if cond.pooled is None else jnp.where(zeros[:, None], 0, cond.pooled),
    )


def with_time_ids(model: Model, cond: Conditioning, x: Array, score: float = AESTHETIC_SCORE) -> Conditioning:
    """The conditioning of a model of the SDXL family with time ids [B, 6 or 5] for latents x [B, h, w, C].

    The ids are the image's original height and width, its crop's top and left (0, 0), and the height and width to draw;
    the refiner has `score`, an aesthetic score, instead of the last two (Podell et al. 2023, sections 2.2 and 2.5). Ids
    that `cond` already has are kept.
    """
    if model.unet.config.addition_embed_type != "text_time" or cond.time_ids is not None:
        return cond
    size = [n * model.vae.config.factor for n in x.shape[1:3]]
    last = [score] if model.options.requires_aesthetics_score else size
    ids = jnp.asarray([*size, 0, 0, *last], jnp.float32)
    return cond._replace(time_ids=jnp.broadcast_to(ids, (x.shape[0], len(ids))))


def in_unit(images: Array) -> Array:
    """Images [..., 3] in [0, 1], from integers (0 to 255) or from floats, which are returned as they are."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if jnp.issubdtype(images.dtype, jnp.integer) else images


def encode(model: Model, params: Params, images: Array, key: Key | None = None) -> Array:
    """Images to latents.

    Args:
        images: [B, H, W, 3], floats in [0, 1] or integers from 0 to 255; H and W multiples of the VAE's factor.
        key: draws the latents from the encoder's Gaussian; None returns its mean.

    Returns:
        [B, h, w, C] float32, scaled as the UNet expects them: (z - shift_factor) * scaling_factor.
    """
    c = model.vae.config
    mean, logvar = apply(model, params, "vae", 2 * in_unit(images) - 1, method="encode")
    z = mean if key is None else mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
    return (z - (c.shift_factor or 0.0)) * c.scaling_factor


def decode(model: Model, params: Params, latents: Array) -> Array:
    """Latents [B, h, w, C], scaled, to images [B, H, W, 3] float32 in [0, 1]."""
    c = model.vae.config
    z = jnp.asarray(latents, jnp.float32) / c.scaling_factor + (c.shift_factor or 0.0)
    images = apply(model, params, "vae", z, method="decode")
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)
