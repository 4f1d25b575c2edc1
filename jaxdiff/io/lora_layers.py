"""The parameters that a LoRA may change: the kernels of layers, the weights of norms, and the biases of both."""

from collections.abc import Iterator
from typing import NamedTuple

from flax.traverse_util import flatten_dict

from jaxdiff.io.lora_config import MODULES
from jaxdiff.io.torch_names import tensor_name
from jaxdiff.typing import Params

BIAS = ".bias"  # suffix of a bias' name: "unet.conv_in.bias"


class Layer(NamedTuple):
    """A layer that a LoRA may change."""

    module: str  # "unet", "text_encoder" or "text_encoder_2"
    name: str  # with the module: "unet.mid_block.attentions.0.proj_in"
    path: tuple[str, ...]  # of its kernel in the parameters
    shape: tuple[int, ...]  # of its kernel: [in, out] or [H, W, in, out]; of a norm's weight: [channels]
    has_bias: bool = False


def layers(params: Params) -> Iterator[Layer]:
    """Every dense layer and convolution of the UNet and the text encoders, from the parameters or their shapes."""
    return _layers_with(params, "kernel")


def norms(params: Params) -> Iterator[Layer]:
    """Every norm with a weight, as `layers`."""
    return (layer for layer in _layers_with(params, "scale") if len(layer.shape) == 1)


def changeable(params: Params) -> dict[str, Layer]:
    """Everything that a LoRA may change, by its name in a `Lora`; biases have one axis, like the weights of norms."""
    by_name = {}
    for layer in (*layers(params), *norms(params)):
        by_name[layer.name] = layer
        if layer.has_bias:
            name, path = f"{layer.name}{BIAS}", (*layer.path[:-1], "bias")
            by_name[name] = Layer(layer.module, name, path, layer.shape[-1:])
    return by_name


def _layers_with(params: Params, leaf_name: str) -> Iterator[Layer]:
    for module in MODULES:
        flat = flatten_dict(params.get(module, {}))
        for path, leaf in flat.items():
            if path[-1] == leaf_name:
                name = f"{module}.{tensor_name(path[:-1])}"
                yield Layer(module, name, (module, *path), tuple(leaf.shape), (*path[:-1], "bias") in flat)
