"""The tiny autoencoder (TAESD) in its author's own layout: an encoder and a decoder, each a file of numbered layers.

The files count the layers of a `torch.nn.Sequential`: `0.weight` is the encoder's first convolution, `1.conv.0.weight`
the first one of its first block. The decoder's first layer clips its input and is not counted by diffusers, where layer
3 is `decoder.layers.2`.
"""

import re
from itertools import pairwise
from pathlib import Path

from jaxdiff.config import TinyVAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io.infer_config import Shapes, as_weights_error
from jaxdiff.io.tensor_files import TensorSource, open_tensors

FIRST_LAYER = "encoder.layers.0.weight"  # in diffusers' names
FIRST = {"encoder": 0, "decoder": 1}  # layer number of the first convolution


def open_pair(path: str | Path) -> tuple[TinyVAEConfig, TensorSource] | None:
    """The config and, under diffusers' names, the tensors of the pair of files that a file belongs to, or None.

    Raises:
        WeightsError: the other file is missing, or the two do not form an autoencoder.
    """
    path, source = Path(path), open_tensors(path)
    if not is_numbered(source):
        return None
    side = "encoder" if "0.weight" in source.shapes else "decoder"
    other = "decoder" if side == "encoder" else "encoder"
    other_path = path.with_name(path.name.replace(side, other))
    if side not in path.name or not other_path.is_file():
        raise WeightsError(
            f"{path} is the {side} of a tiny autoencoder: put the {other} beside it, with {other!r} in its name "
            f"in place of {side!r}."
        )
    sources = {side: source, other: open_tensors(other_path)}
    if not is_numbered(sources[other]):
        raise WeightsError(f"{other_path} is not the {other} of a tiny autoencoder that {path} needs: fetch it again.")
    names = {  # diffusers' -> (which file, its name there)
        f"{part}.layers.{int(number) - FIRST[part]}.{ending}": (part, name)
        for part in FIRST
        for name in sources[part].shapes
        for number, _, ending in [name.partition(".")]
    }
    shapes = {ours: sources[part].shapes[name] for ours, (part, name) in names.items()}
    merged = TensorSource(path, shapes, lambda ours: sources[names[ours][0]].read(names[ours][1]))
    with as_weights_error(merged):
        return infer_config(merged), merged


def is_numbered(source: TensorSource) -> bool:
    return bool(source.shapes) and all(re.fullmatch(r"\d+\.(conv\.\d+\.)?(weight|bias)", n) for n in source.shapes)


def infer_config(source: TensorSource) -> TinyVAEConfig:
    """The config of a tiny autoencoder from the shapes of its tensors under diffusers' names."""
    shapes = {part: Shapes(source, f"{part}.layers.") for part in FIRST}
    # Convolutions separate the levels of blocks; the decoder's upsampling layers have no tensors.
    convs = {
        part: sorted(int(n.split(".")[0]) for n in part_shapes if n.count(".") == 1 and n.endswith("weight"))
        for part, part_shapes in shapes.items()
    }
    blocks = {
        part: tuple(sum(f"{i}.conv.0.weight" in shapes[part] for i in range(a, b)) for a, b in pairwise(positions))
        for part, positions in convs.items()
    }
    encoder, decoder = shapes["encoder"], shapes["decoder"]
    return TinyVAEConfig(
        in_channels=encoder[f"{convs['encoder'][0]}.weight"][1],
        out_channels=decoder[f"{convs['decoder'][-1]}.weight"][0],
        encoder_block_out_channels=tuple(encoder[f"{i}.weight"][0] for i in convs["encoder"][:-1]),
        decoder_block_out_channels=tuple(decoder[f"{i}.weight"][1] for i in convs["decoder"][1:]),
        num_encoder_blocks=blocks["encoder"],
        num_decoder_blocks=blocks["decoder"],
        latent_channels=decoder[f"{convs['decoder'][0]}.weight"][1],
    )
