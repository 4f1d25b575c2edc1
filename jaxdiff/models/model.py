"""A whole text-to-image model as one static value, and the pure functions of its encoders and decoder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.config import CLIPTextConfig, CLIPVisionConfig, TinyVAEConfig, UNetConfig, VAEConfig
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from jaxdiff.models.controlnet import check_fits
from jaxdiff.models.text import Conditioning as Conditioning
from jaxdiff.models.text import encode_text as encode_text
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.scheduler_config import PipelineOptions, SchedulerConfig
from jaxdiff.tokenizer import Tokenizer
from jaxdiff.typing import Array, Key, Params

AESTHETIC_SCORE = 6.0  # what the SDXL refiner is told of the picture wanted


@dataclasses.dataclass(frozen=True)
class Model:
    """Networks, their configs and the tokenizers; hashable, hence static under `jit`. Holds no parameters."""

    text_encoder: CLIPTextModel | None  # None: the SDXL refiner, which has the second one alone
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    tokenizer: Tokenizer | None
    scheduler: SchedulerConfig
    vision_encoder: CLIPVisionModel | None = None  # for contrastive training and scoring; never drawn with
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
        """Whether the UNet was taught inpainting: it sees a mask and the masked picture's latents beside the noise."""
        return self.unet.config.in_channels == 2 * self.vae.config.latent_channels + 1


def with_controlnets(model: Model, params: Params, *controlnets: tuple[Any, Params]) -> tuple[Model, Params]:
    """The model with these ControlNets, (module, params) as `load_controlnet` gives each, in the order of `generate`'s.

    Raises:
        ConfigError: one was trained for a UNet of another shape.
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
    """A model of these configs that computes in `dtype`; `remat` recomputes activations, see `rematerialised`."""
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
    """The autoencoder of a config; the large one in float32 where it is said to overflow in float16."""
    if isinstance(config, TinyVAEConfig):
        return AutoencoderTiny(config, bool(remat), dtype)
    upcast = config.force_upcast and dtype == jnp.float16
    return AutoencoderKL(config, remat, jnp.dtype("float32") if upcast else dtype)


def example_inputs(model: Model) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
    """Smallest inputs of each module, by its key in `params`; one shape is enough to know every parameter's."""
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
    """Numbers beside the pooled text: sizes and crop, or for the refiner a score in place of the target size."""
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
    """Shapes of one module's parameters; tracing it takes a second or two for a network of full size."""
    return jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x)["params"], *inputs)


def apply(model: Model, params: Params, name: str, *args: Any, method: str | None = None) -> Any:
    """One module of the model, by its key in `params`, on its own parameters."""
    return model.modules[name].apply({"params": params[name]}, *args, method=method)


def with_time_ids(model: Model, cond: Conditioning, x: Array, score: float = AESTHETIC_SCORE) -> Conditioning:
    """The conditioning of a model of the SDXL family with time ids [B, 6 or 5] for latents x [B, h, w, C].

    They are the picture's original height and width, where it was cut (0, 0), and the size drawn; or for the refiner
    an aesthetic score in place of that size (Podell et al. 2023, sections 2.2 and 2.5). Ids given are kept.
    """
    if model.unet.config.addition_embed_type != "text_time" or cond.time_ids is not None:
        return cond
    size = [n * model.vae.config.factor for n in x.shape[1:3]]
    last = [score] if model.options.requires_aesthetics_score else size
    ids = jnp.asarray([*size, 0, 0, *last], jnp.float32)
    return cond._replace(time_ids=jnp.broadcast_to(ids, (x.shape[0], len(ids))))


def in_unit(images: Array) -> Array:
    """Pictures as numbers in [0, 1]: whole numbers, such as uint8, are from 0 to 255."""
    images = jnp.asarray(images)
    return images / 255 if jnp.issubdtype(images.dtype, jnp.integer) else images


def encode(model: Model, params: Params, images: Array, key: Key | None = None) -> Array:
    """Pictures to latents.

    Args:
        images: [B, H, W, 3] in [0, 1], or of whole numbers from 0 to 255; H and W multiples of the VAE's factor.
        key: where given, latents are drawn from the encoder's Gaussian; else its mean is returned.

    Returns:
        [B, h, w, C] float32, scaled as the UNet expects them: (z - shift_factor) * scaling_factor.
    """
    c = model.vae.config
    mean, logvar = apply(model, params, "vae", 2 * in_unit(images) - 1, method="encode")
    z = mean if key is None else mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
    return (z - (c.shift_factor or 0.0)) * c.scaling_factor


def decode(model: Model, params: Params, latents: Array) -> Array:
    """Latents [B, h, w, C], scaled, to pictures [B, H, W, 3] float32 in [0, 1]."""
    c = model.vae.config
    z = jnp.asarray(latents, jnp.float32) / c.scaling_factor + (c.shift_factor or 0.0)
    images = apply(model, params, "vae", z, method="decode")
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)
