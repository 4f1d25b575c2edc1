"""A whole text-to-image model of some thousand random parameters, for tests of what surrounds the networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.config import CLIPTextConfig, ControlNetConfig, SchedulerConfig, UNetConfig, VAEConfig
from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.models.model import Model, build, param_shapes
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.text.tokenizer import Tokenizer, train_bpe
from jaxdiff.typing import Params

MAX_LENGTH = 12  # tokens
SIDE = 16  # pixels of an image
FACTOR = 2  # pixels to a latent
LATENT = (8, 8, 4)

UNET = UNetConfig(
    sample_size=SIDE // FACTOR,
    down_block_types=("DownBlock2D",),  # one level: the middle attends to the text, and little is to be compiled
    up_block_types=("UpBlock2D",),
    block_out_channels=(16,),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    sample_size=SIDE,
)
SCHEDULER = SchedulerConfig(  # as in the published Stable Diffusion 1.x
    class_name="DDIMScheduler",
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe(["a castle", "a red dragon", "a blue house", "blurry"], 540, MAX_LENGTH)


def text_config() -> CLIPTextConfig:
    ids = {"bos_token_id": tokenizer().bos_id, "eos_token_id": tokenizer().eos_id, "pad_token_id": tokenizer().pad_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    length = {"vocab_size": tokenizer().vocab_size, "max_position_embeddings": MAX_LENGTH}
    return CLIPTextConfig(**ids, **sizes, **length, projection_dim=16)


def tiny_model(scheduler: SchedulerConfig = SCHEDULER, **kwargs) -> Model:
    return build(text_config(), UNET, VAE, tokenizer(), scheduler, **kwargs)


def tiny_params(model: Model, seed: int = 0) -> Params:
    """Every parameter random, none zero or one, so that each one matters to the image."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 4
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(offset + rng.standard_normal(shape.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(model))


def tiny_upscaler(**sizes) -> tuple[RRDBNet, Params]:
    """A random upscaling network."""
    module = RRDBNet(RRDBConfig(**{"num_block": 1, "num_feat": 8, "num_grow_ch": 4, **sizes}))
    side = module.config.unshuffle
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, side, side, 3), np.float32))["params"]
    return module, jax.tree.map(lambda x: 2 * x, params)


def tiny_controlnet(model: Model) -> tuple[ControlNet, Params]:
    """A ControlNet for the tiny model, none of whose parameters are zero, and they."""
    widths = {"conditioning_embedding_out_channels": (8, 16)}
    config = ControlNetConfig.from_dict(dataclasses.asdict(model.unet.config) | widths)
    net = ControlNet(config, dtype=model.unet.dtype)
    params = net.init(jax.random.key(0), *example_inputs(config))["params"]
    return net, jax.tree.map(lambda x: x + 0.1, params)


def with_two_text_encoders():
    """(model, params) with two text encoders, the second wider."""
    text = text_config()
    wide = CLIPTextConfig.from_dict({**dataclasses.asdict(text), "hidden_size": 24, "with_projection": True})
    model = build(text, UNET, VAE, tokenizer(), SCHEDULER, text_2=wide, tokenizer_2=tokenizer())
    return model, tiny_params(model)
