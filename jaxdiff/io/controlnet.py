"""ControlNets in and out: diffusers' folders, and files in the original layout."""

import dataclasses
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jaxdiff.config import ControlNetConfig
from jaxdiff.io.configs import check_dtype, module_shapes
from jaxdiff.io.infer_config import Shapes, as_weights_error, unet_config
from jaxdiff.io.modules import load_module, save_module
from jaxdiff.io.original_layout import Table, place, unet_table
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors
from jaxdiff.io.torch_names import tensor_name
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.models.unet import per_level
from jaxdiff.typing import Params

PREFIXES = ("control_model.", "")  # of the original layout, in which the whole model may stand beside the ControlNet
HINT = "input_hint_block.{}.weight"


def load_controlnet(path: str | Path, *, dtype: Any = None, variant: str | None = None) -> tuple[ControlNet, Params]:
    """A ControlNet and its parameters.

    Args:
        path: a folder as diffusers writes it, or its file of weights with `config.json` beside it, or a file in the
            original layout, whose config follows from its tensors.
        dtype: type to compute in and to hold the parameters in, "float32" by default.
        variant: of a folder's weights, such as "fp16".

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    if Path(path).is_file():
        source = open_tensors(path)
        for prefix in PREFIXES:
            if prefix + HINT.format(0) in source.shapes:
                return load_original(source, prefix, dtype)
    return load_module(path, ControlNetConfig, ControlNet, example_inputs, dtype, variant)


def save_controlnet(folder: str | Path, controlnet: ControlNet, params: Params, *, dtype: Any = None) -> None:
    """Write a ControlNet as a folder that PyTorch diffusers opens; raises WeightsError if it cannot be written."""
    save_module(folder, controlnet, params, dtype=dtype)


def controlnet_table(c: ControlNetConfig) -> Table:
    """Names of diffusers -> those of the original layout: the UNet's way down, and what is a ControlNet's own.

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


def infer_config(source: TensorSource, prefix: str) -> ControlNetConfig:
    """The config of a ControlNet in the original layout: sizes from its tensors, heads as in Stable Diffusion."""
    shapes = Shapes(source, prefix)
    shapes["out.2.weight"] = [0]  # the UNet's way up, which a ControlNet lacks
    with as_weights_error(source):
        unet = unet_config(shapes, "sd1")
        hints = [shapes[HINT.format(i)] for i in takewhile(lambda i: HINT.format(i) in shapes, count(0, 2))]
        own = {
            "conditioning_channels": hints[0][1],
            "conditioning_embedding_out_channels": tuple(shape[0] for shape in hints[:-1:2]),  # each second one widens
        }
    return ControlNetConfig.from_dict(dataclasses.asdict(unet) | own)


def load_original(source: TensorSource, prefix: str, dtype: Any = None) -> tuple[ControlNet, Params]:
    """The ControlNet among the tensors of an original file whose names start with `prefix`."""
    dtype = check_dtype(dtype)
    controlnet = ControlNet(infer_config(source, prefix), dtype=dtype)
    shapes, table = module_shapes(controlnet, example_inputs, source.path), controlnet_table(controlnet.config)
    found = {}
    for path in flatten_dict(shapes):
        where = place(tensor_name(path), table, prefix)
        if where is not None and where.name in source.shapes:
            found[tensor_name(path)] = where.name
    # What has no place keeps its name, for load_tensors to say so.
    found |= {name: name for name in set(source.shapes) - set(found.values()) if name.startswith(prefix)}
    renamed = {ours: source.shapes[theirs] for ours, theirs in found.items()}
    ours = TensorSource(source.path, renamed, lambda name: source.read(found[name]))
    return controlnet, load_tensors(ours, shapes, dtype)
