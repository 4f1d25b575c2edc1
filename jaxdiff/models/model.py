"""A whole text-to-image model as one static value, and the pure functions of its encoders and decoder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    Config,
    ConfigError,
    Flux2Config,
    Flux2VAEConfig,
    FluxConfig,
    GeneratorConfig,
    PipelineOptions,
    Qwen3Config,
    SchedulerConfig,
    SD3Config,
    T5Config,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    ZImageConfig,
)
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.controlnet import check_fits
from jaxdiff.models.dit import PATCH
from jaxdiff.models.flux import FluxTransformer2DModel
from jaxdiff.models.flux2 import Flux2Transformer2DModel
from jaxdiff.models.generator import TextConditionalGenerator
from jaxdiff.models.qwen3 import Qwen3Model
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.models.sd3 import SD3Transformer2DModel
from jaxdiff.models.t5 import T5EncoderModel
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.models.z_image import ZImageTransformer2DModel
from jaxdiff.text.plain_tokenizer import PlainTokenizer
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.typing import Array, Key, Params

AESTHETIC_SCORE = 6.0  # default input of the SDXL refiner
TRANSFORMER_SIDE = 128  # default latents along a side, for transformers whose config has no sample_size
MODULES: dict[type[Config], Any] = {
    CLIPTextConfig: CLIPTextModel,
    T5Config: T5EncoderModel,
    Qwen3Config: Qwen3Model,
    UNetConfig: UNet2DConditionModel,
    GeneratorConfig: TextConditionalGenerator,
    FluxConfig: FluxTransformer2DModel,
    SD3Config: SD3Transformer2DModel,
    ZImageConfig: ZImageTransformer2DModel,
    Flux2Config: Flux2Transformer2DModel,
}
FAMILIES: dict[type[Config], str] = {
    FluxConfig: "flux",
    SD3Config: "sd3",
    ZImageConfig: "z_image",
    Flux2Config: "flux2",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """Networks, their configs and the tokenizers; hashable, hence static under `jit`. Holds no parameters."""

    text_encoder: Any  # CLIPTextModel or Qwen3Model; None: the SDXL refiner, which has only text_encoder_2
    unet: Any  # UNet2DConditionModel, or a GAN's generator; None where there is a transformer
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: Any  # Tokenizer, or with Qwen3 PlainTokenizer; or None
    scheduler: SchedulerConfig
    vision_encoder: CLIPVisionModel | None = None  # for contrastive training and evaluation; not used by `generate`
    text_encoder_2: Any = None  # SDXL, SD 3: OpenCLIP's, with a projection; FLUX.1: T5's
    tokenizer_2: Any = None
    text_encoder_3: T5EncoderModel | None = None  # SD 3; optional
    tokenizer_3: PlainTokenizer | None = None
    transformer: Any = None  # of FLUX.1, SD 3, Z-Image or FLUX.2
    controlnets: tuple[Any, ...] = ()  # their parameters are the list params["controlnet"], in the same order
    tiny_vae: AutoencoderTiny | None = None  # decodes previews, with params["tiny_vae"]
    upscaler: RRDBNet | None = None  # enlarges between two stages, with params["upscaler"]
    options: PipelineOptions = dataclasses.field(default_factory=PipelineOptions)

    @property
    def modules(self) -> dict:
        """The Flax modules by their key in `params`, without ControlNets."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae", "vision_encoder")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def denoising(self) -> Any:
        """The network that removes noise: the UNet or the transformer."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def family(self) -> str:
        """The model's architecture.

        One of "sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler", "flux", "sd3", "z_image" and "flux2". Inpainting and
        distilled models (`unet.config.time_cond_proj_dim`) belong to the family of their base model.
        """
        if self.transformer is not None:
            return FAMILIES[type(self.transformer.config)]
        if self.text_encoder_2 is not None:
            return "sdxl_refiner" if self.text_encoder is None else "sdxl"
        if self.unet.config.num_class_embeds is not None:
            return "upscaler"
        # ViT-L of SD 1.x has quick_gelu, OpenCLIP's encoders of SD 2.x the exact gelu.
        return "sd2" if self.text_encoder is not None and self.text_encoder.config.hidden_act == "gelu" else "sd1"

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """Default size in latents: the side of a square, or (height, width)."""
        return getattr(self.denoising.config, "sample_size", TRANSFORMER_SIDE)

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this many pixels: those of a latent, or of a transformer's patch."""
        return self.vae.config.factor * (1 if self.transformer is None else PATCH)

    @property
    def is_gan(self) -> bool:
        """Whether the model is a GAN: `unet` is a generator that makes latents from noise in one step."""
        return self.unet is not None and isinstance(self.unet.config, GeneratorConfig)

    @property
    def longest_side(self) -> int | None:
        """The largest height or width in pixels that the transformer has positions for; None: no limit."""
        config = None if self.transformer is None else self.transformer.config
        patches = getattr(config, "pos_embed_max_size", None) or min(getattr(config, "axes_lens", ())[1:], default=None)
        return patches and patches * self.multiple

    @property
    def one_pass(self) -> bool:
        """Whether a step needs no unconditional pass: the guidance scale is an input or is not used."""
        if self.transformer is None:
            return self.is_gan or self.unet.config.time_cond_proj_dim is not None
        return self.family == "flux" or self.options.is_distilled

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale has any effect."""
        embeds_guidance = self.family == "flux" and self.transformer.config.guidance_embeds
        return (self.transformer is None and not self.is_gan) or embeds_guidance or not self.one_pass

    @property
    def inpaints(self) -> bool:
        """Whether the UNet was trained for inpainting: its input also holds a mask and the masked image's latents."""
        return self.unet is not None and self.unet.config.in_channels == 2 * self.vae.config.latent_channels + 1


def computing_in(model: Model, dtype: Any) -> Model:
    """The model with networks that compute in `dtype`, whatever the dtype of its parameters."""
    dtype = jnp.dtype(dtype)
    networks = {name: module.clone(dtype=dtype) for name, module in model.modules.items()}
    controlnets = tuple(module.clone(dtype=dtype) for module in model.controlnets)
    tiny_vae = model.tiny_vae and model.tiny_vae.clone(dtype=dtype)
    upscaler = model.upscaler and model.upscaler.clone(dtype=dtype)
    return dataclasses.replace(model, **networks, controlnets=controlnets, tiny_vae=tiny_vae, upscaler=upscaler)


def with_controlnets(model: Model, params: Params, *controlnets: tuple[Any, Params]) -> tuple[Model, Params]:
    """The model with these ControlNets instead of its own.

    Args:
        controlnets: (module, params) each, as `load_controlnet` returns them; `generate` takes their control images in
            the same order.

    Raises:
        ConfigError: a ControlNet was trained for a UNet of another shape, or the model has no UNet.
    """
    if (model.unet is None or model.is_gan) and controlnets:
        raise ConfigError("ControlNets are for models with a UNet, which this one lacks.")
    for net, _ in controlnets:
        check_fits(net.config, model.unet.config)
    model = dataclasses.replace(model, controlnets=tuple(net for net, _ in controlnets))
    return model, {**params, "controlnet": [p for _, p in controlnets]}


def with_upscaler(model: Model, params: Params, upscaler: tuple[RRDBNet, Params]) -> tuple[Model, Params]:
    """The model with an upscaling network, as `load_upscaler` returns it, for `generate(hires_upscale="network")`."""
    return dataclasses.replace(model, upscaler=upscaler[0]), {**params, "upscaler": upscaler[1]}


def build(
    text: Config | None,
    unet: UNetConfig | GeneratorConfig | None,
    vae: VAEConfig | TinyVAEConfig,
    tokenizer: Tokenizer | PlainTokenizer | None,
    scheduler: SchedulerConfig,
    vision: CLIPVisionConfig | None = None,
    *,
    text_2: Config | None = None,
    tokenizer_2: Tokenizer | PlainTokenizer | None = None,
    text_3: Config | None = None,
    tokenizer_3: PlainTokenizer | None = None,
    transformer: Config | None = None,
    options: PipelineOptions | None = None,
    dtype=jnp.float32,
    remat: bool | str = False,
) -> Model:
    """A model from its configs.

    Args:
        text, text_2, text_3, vision: None for an encoder that the model does not have.
        unet, transformer: exactly one of them is given.
        dtype: the networks' compute dtype.
        remat: whether to recompute activations in the backward pass, or a policy; see `rematerialised`.
    """
    dtype = jnp.dtype(dtype)

    def network(config: Config | None) -> Any:
        return None if config is None else MODULES[type(config)](config, remat, dtype)

    return Model(
        network(text),
        network(unet),
        autoencoder(vae, dtype, remat),
        tokenizer,
        scheduler,
        None if vision is None else CLIPVisionModel(vision, remat, dtype),
        network(text_2),
        tokenizer_2,
        network(text_3),
        tokenizer_3,
        network(transformer),
        options=options or PipelineOptions(),
    )


def autoencoder(
    config: VAEConfig | TinyVAEConfig, dtype: Any, remat: bool | str = False
) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder of a config. AutoencoderKL computes in float32 instead of float16 if its config asks for it."""
    if isinstance(config, TinyVAEConfig):
        return AutoencoderTiny(config, bool(remat), dtype)
    upcast = config.force_upcast and dtype == jnp.float16
    return AutoencoderKL(config, remat, jnp.dtype("float32") if upcast else dtype)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def example_inputs(model: Model) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
    """The smallest inputs of each module, by its key in `params`; the parameters' shapes do not depend on them."""
    vae = model.vae.config
    tokens = (_shape(1, 2, dtype=jnp.int32),)
    inputs: dict[str, tuple] = {n: tokens for n in model.modules if n.startswith("text_encoder")}
    inputs["vae"] = (_shape(1, vae.factor, vae.factor, vae.in_channels),)
    if model.unet is not None:
        inputs["unet"] = unet_inputs(model)
    else:
        c = model.transformer.config
        text = getattr(c, "joint_attention_dim", None) or c.cap_feat_dim
        pooled = getattr(c, "pooled_projection_dim", None)
        x = _shape(1, PATCH, PATCH, c.latent_channels)
        inputs["transformer"] = (x, _shape(1), _shape(1, 2, text), pooled and _shape(1, pooled), None, _shape(1))
    if model.vision_encoder is not None:
        size = model.vision_encoder.config.image_size
        inputs["vision_encoder"] = (_shape(1, size, size, 3),)
    return inputs


def unet_inputs(model: Model) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """The smallest inputs of a UNet."""
    unet = model.unet.config
    side = unet.sample_size if model.is_gan else 2 ** (len(unet.block_out_channels) - 1)
    extra: list[jax.ShapeDtypeStruct | None] = [None] * 5  # pooled, time_ids, attention_mask, class_labels, guidance
    if unet.addition_embed_type == "text_time":
        assert unet.projection_class_embeddings_input_dim  # checked by `UNetConfig.from_dict`
        assert unet.addition_time_embed_dim
        ids = time_id_count(model)
        pooled = unet.projection_class_embeddings_input_dim - ids * unet.addition_time_embed_dim
        extra[:2] = _shape(1, pooled), _shape(1, ids)
    if unet.class_embed_type is None and unet.num_class_embeds is not None:
        extra[3] = _shape(1, dtype=jnp.int32)
    elif unet.class_embed_type is not None:
        widths = {"identity": 4 * unet.block_out_channels[0], "timestep": None}
        width = widths.get(unet.class_embed_type, unet.projection_class_embeddings_input_dim)
        extra[3] = _shape(1) if width is None else _shape(1, width)
    if unet.time_cond_proj_dim is not None:
        extra[4] = _shape(1, unet.time_cond_proj_dim)
    x = _shape(1, side, side, unet.in_channels)
    return x, _shape(1), _shape(1, 2, unet.cross_attention_dim), *extra


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
    """The tree of `init_params` as shapes and dtypes, without allocating anything."""
    return {name: module_shapes(model.modules[name], x) for name, x in sorted(example_inputs(model).items())}


def module_shapes(module: Any, inputs: tuple[jax.ShapeDtypeStruct | None, ...]) -> Params:
    """Shapes and dtypes of one module's parameters, without allocating anything."""
    return jax.tree.map(lambda x: x, _traced_shapes(module, inputs))  # copies the cached tree


@functools.lru_cache(maxsize=64)
def _traced_shapes(module: Any, inputs: tuple[jax.ShapeDtypeStruct | None, ...]) -> Params:
    """`module_shapes`, cached: tracing a network of full size takes a second or two."""
    return jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *inputs)


def apply(model: Model, params: Params, name: str, *args: Any, method: str | None = None) -> Any:
    """The output of one module, named by its key in `params`, with its own parameters."""
    return model.modules[name].apply({"params": params[name]}, *args, method=method)


def with_time_ids(model: Model, cond: Conditioning, x: Array, score: float = AESTHETIC_SCORE) -> Conditioning:
    """The conditioning with SDXL's time ids [B, 6 or 5] for latents x [B, h, w, C]; unchanged for other models.

    The ids are the original height and width, the crop's top and left (0, 0), and the target height and width in
    pixels; the refiner has `score`, an aesthetic score, instead of the last two (Podell et al. 2023, sections 2.2 and
    2.5). Existing ids are kept.
    """
    if model.unet is None or model.unet.config.addition_embed_type != "text_time" or cond.time_ids is not None:
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
        key: scalar, to draw the latents from the encoder's Gaussian; None returns its mean.

    Returns:
        [B, h, w, C] float32, scaled as the network expects them: (z - shift_factor) * scaling_factor.
    """
    return scaled(model, params, encode_unscaled(model, params, images, key))


def decode(model: Model, params: Params, latents: Array) -> Array:
    """Latents [B, h, w, C], scaled as `encode` returns them, to images [B, H, W, 3] float32 in [0, 1]."""
    return decode_unscaled(model, params, unscaled(model, params, latents))


def encode_unscaled(model: Model, params: Params, images: Array, key: Key | None = None) -> Array:
    """`encode` without its scaling."""
    mean, logvar = apply(model, params, "vae", 2 * in_unit(images) - 1, method="encode")
    return mean if key is None else mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)


def decode_unscaled(model: Model, params: Params, z: Array) -> Array:
    """`decode` of what `unscaled` returns."""
    return jnp.clip(apply(model, params, "vae", z, method="decode") / 2 + 0.5, 0.0, 1.0)


def scaled(model: Model, params: Params, z: Array) -> Array:
    """The autoencoder's latents [B, h, w, C] as the denoising network expects them."""
    c: Any = model.vae.config
    if isinstance(c, Flux2VAEConfig):
        mean, deviation = patch_statistics(model, params, z)
        return (z - mean) / deviation
    return (z - (c.shift_factor or 0.0)) * c.scaling_factor


def unscaled(model: Model, params: Params, latents: Array) -> Array:
    """The reverse of `scaled`."""
    c: Any = model.vae.config
    latents = jnp.asarray(latents, jnp.float32)
    if isinstance(c, Flux2VAEConfig):
        mean, deviation = patch_statistics(model, params, latents)
        return latents * deviation + mean
    return latents / c.scaling_factor + (c.shift_factor or 0.0)


def patch_statistics(model: Model, params: Params, z: Array) -> tuple[Array, Array]:
    """FLUX.2: the mean and deviation [h, w, C] by which latents z [B, h, w, C] are normalised."""
    return model.vae.apply({"params": params["vae"]}, *z.shape[1:3], method="statistics")  # type: ignore[return-value]
