"""Inferring the configs of networks from one file with diffusers' names and no `config.json`.

The names are translated to the original layout, from which `infer_config` reads the sizes.
"""

import dataclasses

from jaxdiff.config import ControlNetConfig, UNetConfig, VAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.infer_config import Shapes, as_weights_error, unet_config, vae_config
from jaxdiff.io.original_layout import Table, place, unet_table, vae_table
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.torch_names import current_name
from jaxdiff.models.unet import per_level

ADDITION_WIDTH = 256  # of each of SDXL's sizes and crops, in the published models
HINT = "input_hint_block.{}.weight"


class Renamed(Shapes):
    """The shapes of a file in diffusers' names, under those of the original layout."""

    def __init__(self, source: TensorSource, table: Table):
        places = ((place(current_name(n), table, ""), shape) for n, shape in source.shapes.items())
        shapes = {location.name: shape for location, shape in places if location}
        super().__init__(dataclasses.replace(source, shapes=shapes), "")
        self.names = {theirs: ours for ours, theirs in table.items()}

    def __missing__(self, name: str) -> list[int]:
        location = place(name, self.names, "")
        missing = location.name if location else name
        raise WeightsError(f"{self.path} lacks the tensor {missing}: fetch the whole file again.")


def controlnet_table(c: ControlNetConfig) -> Table:
    """Diffusers' names -> those of the original layout: the UNet's encoder, and the layers that only ControlNets have.

    >>> table = controlnet_table(ControlNetConfig())
    >>> table["controlnet_cond_embedding.conv_out"], table["controlnet_down_blocks.11"]
    ('input_hint_block.14', 'zero_convs.11.0')
    """
    levels, hints = len(c.block_out_channels), 2 * (len(c.conditioning_embedding_out_channels) - 1)
    encoder = ["conv_in", *(f"blocks.{i}" for i in range(hints)), "conv_out"]
    skips = sum(per_level(c.layers_per_block, levels)) + levels
    return (
        unet_table(c)
        | {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(encoder)}
        | {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(skips)}
        | {"controlnet_mid_block": "middle_block_out.0"}
    )


def controlnet_shapes(source: TensorSource) -> Renamed:
    """The shapes of a ControlNet in diffusers' names."""
    shapes = Shapes(source, "")
    levels = shapes.count("down_blocks.{}.")
    hints = shapes.count("controlnet_cond_embedding.blocks.{}.") // 2
    config = ControlNetConfig(  # only what the names depend on
        block_out_channels=(1,) * levels,
        layers_per_block=tuple(shapes.count(f"down_blocks.{i}.resnets.{{}}.") for i in range(levels)),
        up_block_types=("UpBlock2D",) * levels,
        conditioning_embedding_out_channels=(1,) * (hints + 1),
        addition_embed_type="text_time",
    )
    return Renamed(source, controlnet_table(config))


def controlnet_config(source: TensorSource, shapes: Shapes, like: UNetConfig | None = None) -> ControlNetConfig:
    """The config of a ControlNet from its shapes under the names of the original layout.

    Args:
        like: the config of the UNet to control, for settings that cannot be inferred; by default the published Stable
            Diffusion's.
    """
    shapes["out.2.weight"] = [0]  # of the UNet's decoder, which a ControlNet lacks
    has_text_time = "label_emb.0.0.weight" in shapes
    with as_weights_error(source):
        width = (like.addition_time_embed_dim if like else None) or ADDITION_WIDTH
        pooled = shapes["label_emb.0.0.weight"][1] - 6 * width if has_text_time else None
        unet = unet_config(shapes, "sdxl" if has_text_time else "sd1", pooled)
        hints = [shapes[HINT.format(0)]]
        while HINT.format(2 * len(hints)) in shapes:
            hints.append(shapes[HINT.format(2 * len(hints))])
        hint_values = {
            "conditioning_channels": hints[0][1],
            "conditioning_embedding_out_channels": tuple(shape[0] for shape in hints[:-1:2]),  # every second one widens
        }
    if like is not None and like.block_out_channels == unet.block_out_channels:
        not_inferred: tuple[str, ...] = (
            "attention_head_dim", "num_attention_heads", "norm_num_groups", "norm_eps", "act_fn", "freq_shift",
            "flip_sin_to_cos", "downsample_padding",
        )  # fmt: skip
        if not any(".attentions." in name or ".transformer_blocks." in name for name in source.shapes):
            not_inferred += ("cross_attention_dim", "use_linear_projection")
        unet = dataclasses.replace(unet, **{name: getattr(like, name) for name in not_inferred})
    return ControlNetConfig.from_dict(dataclasses.asdict(unet) | hint_values)


def vae_from_names(source: TensorSource) -> VAEConfig:
    """The config of an autoencoder in diffusers' names; what cannot be inferred is as in Stable Diffusion 1.x."""
    shapes = Shapes(source, "")
    with as_weights_error(source):
        levels, layers = shapes.count("encoder.down_blocks.{}."), shapes.count("encoder.down_blocks.0.resnets.{}.")
        config = VAEConfig(block_out_channels=(1,) * levels, layers_per_block=layers)
        return vae_config(Renamed(source, vae_table(config)), "sd1")
