"""Small models for LoRAs, and files of LoRAs as the programs that train them write them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxdiff.config import CLIPTextConfig, UNetConfig
from jaxdiff.io.lora import merge_lora
from jaxdiff.io.lora_layers import layers
from jaxdiff.io.torch_names import from_torch_layout, tensor_name, to_torch_layout
from jaxdiff.models.model import Model, build, param_shapes
from tests.support import networks, tiny

ATTENTION = r"attn[12]\.to_|self_attn"


def small_model(unet: str = "sd1", text_2: str | None = None) -> Model:
    texts = [None if name is None else CLIPTextConfig.from_dict(networks.TEXTS[name]) for name in ("vit_l", text_2)]
    config = UNetConfig.from_dict(networks.UNETS[unet])
    return build(texts[0], config, tiny.VAE, tiny.tokenizer(), tiny.SCHEDULER, text_2=texts[1])


def drawn_params(model: Model):
    """The weights that `tests.support.oracle.drawn` gives to the PyTorch networks."""
    flat = {}
    for path, leaf in flatten_dict(param_shapes(model)).items():
        shape = to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
        flat[path] = jnp.asarray(from_torch_layout(path, networks.draw(tensor_name(path[1:]), shape)))
    return unflatten_dict(flat)


def matrices(params, pattern: str, seed: int = 0, rank: int = 3, only=("unet", "text_encoder", "text_encoder_2")):
    """Random (module, PyTorch name, down, up) in PyTorch's layout for the layers whose names match."""
    rng = np.random.default_rng(seed)
    found = []
    for layer in layers(params):
        if layer.module in only and re.search(pattern, layer.name):
            out, *rest = to_torch_layout(("kernel",), np.broadcast_to(0, layer.shape)).shape
            down = rng.standard_normal((rank, *rest)) / np.sqrt(np.prod(rest))
            up = rng.standard_normal((out, rank, *(1,) * (len(rest) - 1)))
            name = layer.name.removeprefix(f"{layer.module}.")
            found.append((layer.module, name, down.astype(np.float32), up.astype(np.float32)))
    return found


def full(module: str, name: str) -> str:
    return name if module == "unet" or name == "text_projection" else f"text_model.{name}"


def peft(module, name, down, up):
    stem = f"{module}.{full(module, name)}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def older(module, name, down, up):
    part = "lora" if module == "unet" else "lora_linear_layer"
    stem = f"{module}.{full(module, name)}.{part}"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


def processor(module, name, down, up):
    name = (
        name.replace(".attn1.", ".attn1.processor.")
        .replace(".attn2.", ".attn2.processor.")
        .replace("to_out.0", "to_out")
    )
    for text, unet in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        name = name.replace(text, unet)
    stem = f"{module}.{full(module, name)}_lora"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up}


def kohya(module, name, down, up, double=False):
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if double else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    stem = prefix[module] + full(module, name).replace(".", "_")
    # diffusers gives all attention, and all of a text encoder, the file's most frequent alpha; so these have that one.
    alpha = np.array(0.5 if "conv1" in name else 2.0, np.float32)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def written(path, writer, found, metadata=None):
    tensors = {}
    for parts in found:
        tensors |= writer(*parts)
    save_file(tensors, path, metadata=metadata)
    return path


merge = jax.jit(merge_lora)  # one compilation, not one for each operation on each shape
