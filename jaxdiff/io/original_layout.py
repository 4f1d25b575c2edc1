"""The original layout of latent diffusion's one-file checkpoints <-> the names of diffusers and transformers.

A one-file checkpoint holds the tensors of all networks under the names of the original training code: the UNet's
blocks are numbered consecutively (`input_blocks.4.1`: block 4, its second part), where diffusers counts them by level
(`down_blocks.1.attentions.0`). Each function returns one network's table of prefixes (ours, theirs), of which the
longest match applies. Saving reads a table from left to right, loading from right to left.

The levels and the order of their parts are those of Rombach et al. 2022, appendix E (UNet) and G (autoencoder), after
Ho et al. 2020, appendix B; the text encoders are CLIP's (Radford et al. 2021) and OpenCLIP's (Cherti et al. 2022).
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxdiff.config import CLIPTextConfig, UNetConfig, VAEConfig
from jaxdiff.models.unet import attends, per_level

Table = dict[str, str]  # ours -> theirs

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    # Our own: the original layout predates distillation, and diffusers' reader of it ignores this tensor.
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
CLASS_TABLE = {"class_embedding": "label_emb"}  # a table of vectors: the x4 upscaler's noise levels
CLASS_DENSE = {"class_embedding.linear_1": "label_emb.0.0", "class_embedding.linear_2": "label_emb.0.2"}
ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # SDXL's sizes
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{side}.conv_in": f"{side}.conv_in" for side in ("encoder", "decoder")},
    **{f"{side}.conv_norm_out": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.conv_out": f"{side}.conv_out" for side in ("encoder", "decoder")},
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
SD3_CLIP = {  # both CLIPs, in transformers' names, in one-file checkpoints of Stable Diffusion 3
    **{name: f"text_model.{name}" for name in ("embeddings", "encoder", "final_layer_norm")},
    "text_projection.weight": "text_projection.weight",
}
OPENCLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",  # transposed
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.q_proj.weight": "attn.in_proj_weight",  # query, key and value stacked in one matrix
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def nested(table: Table, ours: str, theirs: str) -> Table:
    """A block's table with the block's prefixes added."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in table.items()}


def unet_table(c: UNetConfig) -> Table:
    """The UNet's down, middle and up blocks; the last block of each level changes the resolution.

    >>> table = unet_table(UNetConfig())
    >>> table["down_blocks.1.attentions.0"], table["up_blocks.0.upsamplers.0.conv"], table["mid_block.resnets.1.conv1"]
    ('input_blocks.4.1', 'output_blocks.2.1.conv', 'middle_block.2.in_layers.2')
    """
    levels = len(c.block_out_channels)
    layers = per_level(c.layers_per_block, levels)
    table = UNET_ENDS | (CLASS_TABLE if c.class_embed_type is None else CLASS_DENSE)
    if c.addition_embed_type is not None:
        table |= ADDED
    block = 1  # 0 is conv_in
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for j in range(layers[level]):
            table |= nested(UNET_RESNET, f"{ours}.resnets.{j}", f"input_blocks.{block}.0")
            table[f"{ours}.attentions.{j}"] = f"input_blocks.{block}.1"
            block += 1
        if level < levels - 1:
            table[f"{ours}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    table |= nested(UNET_RESNET, "mid_block.resnets.0", "middle_block.0")
    table["mid_block.attentions.0"] = "middle_block.1"
    table |= nested(UNET_RESNET, "mid_block.resnets.1", "middle_block.2")
    block = 0
    for level in range(levels):
        ours, attend = f"up_blocks.{level}", attends(c.up_block_types[level])
        for j in range(layers[levels - 1 - level] + 1):
            table |= nested(UNET_RESNET, f"{ours}.resnets.{j}", f"output_blocks.{block}.0")
            if attend:
                table[f"{ours}.attentions.{j}"] = f"output_blocks.{block}.1"
            block += 1
        if level < levels - 1:
            table[f"{ours}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{1 + attend}.conv"
    return table


def vae_table(c: VAEConfig) -> Table:
    """The autoencoder; the original layout numbers the decoder's levels by resolution, like the encoder's.

    >>> table = vae_table(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
    >>> table["decoder.up_blocks.0.resnets.2.conv_shortcut"], table["encoder.mid_block.attentions.0.to_out.0"]
    ('decoder.up.3.block.2.nin_shortcut', 'encoder.mid.attn_1.proj_out')
    """
    table, last = dict(VAE_ENDS), len(c.block_out_channels) - 1
    for level in range(last + 1):
        for j in range(c.layers_per_block):
            table |= nested(VAE_RESNET, f"encoder.down_blocks.{level}.resnets.{j}", f"encoder.down.{level}.block.{j}")
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{last - level}"
        for j in range(c.layers_per_block + 1):
            table |= nested(VAE_RESNET, f"{ours}.resnets.{j}", f"{theirs}.block.{j}")
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    for side in ("encoder", "decoder"):
        for j in range(2):
            table |= nested(VAE_RESNET, f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}")
        table |= nested(VAE_ATTENTION, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
    return table


def openclip_table(c: CLIPTextConfig) -> Table:
    """OpenCLIP's text encoder, in SD 2.x and SDXL. CLIP's own has transformers' names."""
    table = dict(OPENCLIP_ENDS)
    for i in range(c.num_hidden_layers):
        table |= nested(OPENCLIP_LAYER, f"encoder.layers.{i}", f"transformer.resblocks.{i}")
    return table


class Place(NamedTuple):
    """Where a file stores a tensor, and in which form."""

    name: str
    third: int | None = None  # of the rows of a fused projection: 0 query, 1 key, 2 value
    transposed: bool = False
    squeezed: bool = False  # a dense kernel [out, in] that is stored as a 1x1 convolution


def place(ours: str, table: Table, prefix: str) -> Place | None:
    """Where the original layout stores one of our tensors; None if it has no place for it.

    >>> place("decoder.mid_block.attentions.0.to_q.weight", vae_table(VAEConfig()), VAE_PREFIX)
    Place(name='first_stage_model.decoder.mid.attn_1.q.weight', third=None, transposed=False, squeezed=True)
    """
    for start in _prefixes(ours):
        if start in table:
            theirs = table[start]
            fused = theirs.rpartition(".")[2].startswith("in_proj_")
            third = "qkv".index(ours.partition("self_attn.")[2][0]) if fused else None
            squeezed = ".attn_1." in theirs and ours.endswith(".weight") and "norm" not in ours
            return Place(prefix + theirs + ours[len(start) :], third, theirs == "text_projection", squeezed)
    return None


def _prefixes(name: str) -> Iterator[str]:
    """
    >>> list(_prefixes("a.b.c"))
    ['a.b.c', 'a.b', 'a']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]
