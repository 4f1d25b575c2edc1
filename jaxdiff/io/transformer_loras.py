"""LoRAs of transformers in the original layout: what they change in one of their layers, in each of ours.

A LoRA of queries, keys and values together has one `down` for all three, and an `up` whose rows are divided among them.
So has a LoHa; the rows of a LoKr's Kronecker product are no part's.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from jaxdiff.errors import WeightsError
from jaxdiff.io import lycoris
from jaxdiff.io.lora_layers import Layer
from jaxdiff.io.lora_names import LORA
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.transformer_layout import Piece, pieces, rows_of_theirs, swap_halves

PREFIXES = ("", "diffusion_model.", "transformer.", "model.diffusion_model.", "base_model.model.", "unet.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
MODULE = "transformer"
BY_OUTPUT = (
    "up",
    "up_bias",
    "bias",
    "diff",
    "hada_w1_a",
    "hada_w2_a",
)  # tensors whose rows are those of the layer's weight


def _outputs(layers: Iterable[Layer]) -> dict[str, int]:
    """The number of outputs of each of the transformer's layers, by its PyTorch name."""
    return {x.name.removeprefix(f"{MODULE}."): x.shape[-1] for x in layers if x.module == MODULE}


def in_our_layers(source: TensorSource, family: str, layers: Iterable[Layer]) -> TensorSource:
    """The file with a tensor for each of our layers where it has one for several; other tensors as they are.

    Args:
        family: of the model, see `Model.family`.
        layers: the model's, those of its transformer among them.

    Raises:
        WeightsError: a layer of theirs has other outputs than ours together.
    """
    rows = _outputs(layers)
    changed: dict[str, list[tuple[str, Piece]]] = {}  # their layer -> ours
    found = pieces(family, rows)
    sums = rows_of_theirs(found, rows)
    for ours, piece in found.items():
        if piece.name != ours:
            changed.setdefault(piece.name, []).append((ours, piece))
    spelled = {prefix + theirs: theirs for theirs in changed for prefix in PREFIXES}
    spelled |= {prefix + theirs.replace(".", "_"): theirs for theirs in changed for prefix in UNDERSCORED}
    shapes: dict[str, list[int]] = {}
    places: dict[str, tuple[str, Piece, int | None]] = {}
    for name, shape in source.shapes.items():
        match = LORA.fullmatch(name)
        if match is None or match[1] not in spelled:
            shapes[name] = shape
            continue
        role, ending = match.lastgroup, name.removeprefix(match[1])
        for ours, piece in changed[spelled[match[1]]]:
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


def in_their_layers(
    factors: Mapping[str, tuple[np.ndarray, np.ndarray, float]], family: str, layers: Iterable[Layer]
) -> dict[str, np.ndarray]:
    """A transformer's LoRA as kohya's scripts write it: their layers, each of the ranks of ours together.

    Args:
        factors: by our layer's name with its module: down [rank, in], up [out, rank], and alpha.
        family, layers: as of `in_our_layers`.

    Returns:
        The tensors by name; alpha is the rank, and up holds what remains of ours.
    """
    rows = _outputs(layers)
    members: dict[str, list[tuple[str, Piece]]] = {}
    for ours, piece in pieces(family, rows).items():
        members.setdefault(piece.name, []).append((ours, piece))
    found: dict[str, np.ndarray] = {}
    for theirs, group in members.items():
        own = [(ours, piece, factors[name]) for ours, piece in group if (name := f"{MODULE}.{ours}") in factors]
        if not own:
            continue
        down = np.concatenate([down for _, _, (down, _, _) in own])
        up = np.zeros((sum(rows[ours] for ours, _ in group), len(down)), down.dtype)
        first = 0
        for ours, piece, (_, part, alpha) in own:
            rank = part.shape[1]
            part = swap_halves(part) if piece.swapped else part
            up[piece.start : piece.start + rows[ours], first : first + rank] = part * np.float32(alpha / rank)
            first += rank
        stem = f"lora_unet_{theirs.replace('.', '_')}"
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        found[f"{stem}.alpha"] = np.asarray(first, np.float32)
    return found
