"""Paths of parameters <-> the names and layouts of PyTorch's tensors.

Modules are named as in diffusers and transformers, so one rule maps every tensor: the parts of the path are joined by
dots, lists are numbered (`resnets_0` -> `resnets.0`), PART_NAMES lists the parts that span several PyTorch modules, and
Flax's kernel, scale and embedding are PyTorch's `weight`. Two layouts differ: convolution kernels are [H, W, in, out]
in Flax and [out, in, H, W] in PyTorch, dense kernels [in, out] and [out, in].
"""

from collections.abc import Sequence

import numpy as np

LISTS = (
    "attentions",
    "blocks",
    "body",
    "context_refiner",
    "controlnet_down_blocks",
    "down_blocks",
    "downsamplers",
    "encoder_block",
    "layers",
    "main",
    "noise_refiner",
    "resnets",
    "single_transformer_blocks",
    "transformer_blocks",
    "up_blocks",
    "upsamplers",
)
PART_NAMES = {  # our part of a path -> PyTorch's
    "to_out_0": "to_out.0",
    "net_0_proj": "net.0.proj",
    "net_2": "net.2",
    "x_embedder_2_1": "all_x_embedder.2-1",
    "final_layer_2_1": "all_final_layer.2-1",
    "adaLN_modulation_0": "adaLN_modulation.0",
    "adaLN_modulation_1": "adaLN_modulation.1",
    "cap_embedder_0": "cap_embedder.0",
    "cap_embedder_1": "cap_embedder.1",
    "mlp_0": "mlp.0",
    "mlp_2": "mlp.2",
    "conv_0": "conv.0",
    "conv_2": "conv.2",
    "conv_4": "conv.4",
    "mlp_fc1": "mlp.fc1",
    "mlp_fc2": "mlp.fc2",
    "self_attn_q_proj": "self_attn.q_proj",
    "self_attn_k_proj": "self_attn.k_proj",
    "self_attn_v_proj": "self_attn.v_proj",
    "self_attn_out_proj": "self_attn.out_proj",
    "self_attn_o_proj": "self_attn.o_proj",
    "self_attn_q_norm": "self_attn.q_norm",
    "self_attn_k_norm": "self_attn.k_norm",
    "mlp_gate_proj": "mlp.gate_proj",
    "mlp_up_proj": "mlp.up_proj",
    "mlp_down_proj": "mlp.down_proj",
    "encoder_block": "encoder.block",
    "encoder_final_layer_norm": "encoder.final_layer_norm",
    "layer_0_SelfAttention": "layer.0.SelfAttention",
    "layer_0_layer_norm": "layer.0.layer_norm",
    "layer_1_DenseReluDense": "layer.1.DenseReluDense",
    "layer_1_layer_norm": "layer.1.layer_norm",
    "embeddings_token_embedding": "embeddings.token_embedding",
    "embeddings_position_embedding": "embeddings.position_embedding",
    "embeddings_patch_embedding": "embeddings.patch_embedding",
    "embeddings_class_embedding": "embeddings.class_embedding",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}
OLD_NAMES = {  # names in older files -> current names
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
# Some versions of transformers add these to every name but the projection's.
PREFIXES = ("text_model.", "vision_model.", "model.")
SECOND_NAMES = {"encoder.embed_tokens.weight": "shared.weight"}  # T5's embedding has two names


def tensor_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a parameter.

    >>> tensor_name(("down_blocks_0", "attentions_1", "transformer_blocks_0", "attn1", "to_out_0", "kernel"))
    'down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight'
    """
    parts = []
    for part in path:
        stem, _, number = part.rpartition("_")
        parts.append(f"{PART_NAMES.get(stem, stem)}.{number}" if stem in LISTS else PART_NAMES.get(part, part))
    return ".".join(parts)


def current_name(name: str) -> str:
    """The current name of a tensor in a file, without prefixes and old names that only some versions write.

    >>> current_name("text_model.final_layer_norm.bias"), current_name("decoder.mid_block.attentions.0.query.bias")
    ('final_layer_norm.bias', 'decoder.mid_block.attentions.0.to_q.bias')
    """
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    name = SECOND_NAMES.get(name, name)
    return ".".join(OLD_NAMES.get(part, part) for part in name.split("."))


def flax_name(keys: tuple[str, ...]) -> str:
    """The PyTorch name of a tensor in a file of Hugging Face's former Flax models.

    >>> flax_name(("down_blocks_0", "attentions_1", "transformer_blocks_0", "ff", "net_0", "proj", "kernel"))
    'down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight'
    """
    *parts, last = keys
    # A number after an underscore is an index into a list, except in `linear_1` and `linear_2`.
    numbered = [
        f"{stem}.{n}" if n.isdigit() and stem not in ("", "linear") else part
        for part in parts
        for stem, _, n in [part.rpartition("_")]
    ]
    return ".".join([*numbered, "weight" if last in ("kernel", "scale", "embedding") else last])


def to_torch_layout(keys: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """A parameter of this path in PyTorch's layout: of kernels, [out, in] or [out, in, H, W]."""
    if keys[-1] != "kernel":
        return x
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def torch_shape(keys: tuple[str, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that a parameter of this path has in PyTorch's layout.

    >>> torch_shape(("conv_in", "kernel"), (3, 3, 4, 320))
    (320, 4, 3, 3)
    """
    return to_torch_layout(keys, np.broadcast_to(0, shape)).shape


def from_torch_layout(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """The reverse of `to_torch_layout`."""
    if path[-1] != "kernel":
        return x
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
