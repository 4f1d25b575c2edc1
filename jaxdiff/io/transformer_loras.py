"""LoRAs of transformers in the original layout, whose fused layers are several of ours.

A LoRA of fused queries, keys and values has one `down` for all three, and an `up` whose rows are split among them, as
does a LoHa. The Kronecker product of a LoKr cannot be split by rows.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from jaxdiff.errors import WeightsError
from jaxdiff.io import lycoris
from jaxdiff.io.lora_layers import Layer
from jaxdiff.io.lora_names import LORA
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.transformer_layout import Piece, pieces, swap_halves, total_rows

PREFIXES = ("", "diffusion_model.", "transformer.", "model.diffusion_model.", "base_model.model.", "unet.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
MODULE = "transformer"
BY_OUTPUT = ("up", "up_bias", "bias", "diff", "hada_w1_a", "hada_w2_a")  # with one row for each output of the layer


def _outputs(layers: Iterable[Layer]) -> dict[str, int]:
    """The number of outputs of each of the transformer's layers, by its PyTorch name."""
    return {x.name.removeprefix(f"{MODULE}."): x.shape[-1] for x in layers if x.module == MODULE}


def split_fused_layers(source: TensorSource, family: str, layers: Iterable[Layer]) -> TensorSource:
    """The file with the tensors of fused layers split into those of ours; other tensors are unchanged.

    Args:
        family: of the model, see `Model.family`.
        layers: of the model, including its transformer's.

    Raises:
        WeightsError: a fused layer's outputs do not add up to those of our layers.
    """
    rows = _outputs(layers)
    members: dict[str, list[tuple[str, Piece]]] = {}  # their layer -> ours
    located = pieces(family, rows)
    sums = total_rows(located, rows)
    for ours, piece in located.items():
        if piece.name != ours:
            members.setdefault(piece.name, []).append((ours, piece))
    spellings = {prefix + theirs: theirs for theirs in members for prefix in PREFIXES}
    spellings |= {prefix + theirs.replace(".", "_"): theirs for theirs in members for prefix in UNDERSCORED}
    shapes: dict[str, list[int]] = {}
    places: dict[str, tuple[str, Piece, int | None]] = {}
    for name, shape in source.shapes.items():
        match = LORA.fullmatch(name)
        if match is None or match[1] not in spellings:
            shapes[name] = shape
            continue
        role, ending = match.lastgroup, name.removeprefix(match[1])
        for ours, piece in members[spellings[match[1]]]:
            if str(role).startswith("lokr") or role in lycoris.NEEDED:
                (kind,) = lycoris.kinds({str(role)})
                article = "an" if kind[0] in "O(" else "a"
                raise WeightsError(
                    f"{source.path} changes {match[1]} by {article} {kind}, which stands for several layers: give one "
                    "in the names of diffusers."
                )
            divided = role in BY_OUTPUT or (role == "magnitude" and shape[:1] != [1])  # [1, in] is by inputs
            if divided and shape[:1] != [sums[piece.name]]:
                raise WeightsError(
                    f"{source.path} does not fit this model: {name} has the shape {list(shape)}, for a layer of "
                    f"{sums[piece.name]} outputs."
                )
            new = f"{MODULE}.{ours}{ending}"
            shapes[new] = [rows[ours], *shape[1:]] if divided else list(shape)
            places[new] = name, piece, rows[ours] if divided else None

    def read(name: str) -> np.ndarray:
        if name not in places:
            return source.read(name)
        theirs, piece, count = places[name]
        x = np.asarray(source.read(theirs))
        if count is None:
            return x
        x = x if piece.whole else x[piece.start : piece.start + count]
        return swap_halves(x) if piece.swapped else x

    return dataclasses.replace(source, shapes=shapes, read=read)


def fuse_layers(
    factors: Mapping[str, tuple[np.ndarray, np.ndarray, float]], family: str, layers: Iterable[Layer]
) -> dict[str, np.ndarray]:
    """A transformer's LoRA as kohya's scripts write it, with fused layers whose rank is the sum of ours.

    Args:
        factors: by our layer's name with its module: down [rank, in], up [out, rank], and alpha.
        family, layers: as for `split_fused_layers`.

    Returns:
        The tensors by name; alpha is the rank, and our alpha / rank is multiplied into up.
    """
    rows = _outputs(layers)
    members: dict[str, list[tuple[str, Piece]]] = {}
    for ours, piece in pieces(family, rows).items():
        members.setdefault(piece.name, []).append((ours, piece))
    tensors: dict[str, np.ndarray] = {}
    for theirs, group in members.items():
        changed = [(ours, piece, factors[name]) for ours, piece in group if (name := f"{MODULE}.{ours}") in factors]
        if not changed:
            continue
        down = np.concatenate([down for _, _, (down, _, _) in changed])
        up = np.zeros((sum(rows[ours] for ours, _ in group), len(down)), down.dtype)
        rank_offset = 0
        for ours, piece, (_, up_part, alpha) in changed:
            rank = up_part.shape[1]
            up_part = swap_halves(up_part) if piece.swapped else up_part
            up[piece.start : piece.start + rows[ours], rank_offset : rank_offset + rank] = up_part * np.float32(
                alpha / rank
            )
            rank_offset += rank
        stem = f"lora_unet_{theirs.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = np.asarray(rank_offset, np.float32)
    return tensors
