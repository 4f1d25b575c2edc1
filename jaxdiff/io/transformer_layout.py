"""The transformers' original layouts: what their authors, ComfyUI and kohya's scripts call the tensors.

There several of our layers are one: queries, keys and values, and in FLUX.1's single blocks the feed-forward's first
layer as well. A table says what each of their layers holds, `#` being a block's number; what no table names is called
alike. The last modulation is shift, scale there, and scale, shift in diffusers' files.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from jaxdiff.errors import WeightsError
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.torch_names import tensor_name, torch_shape
from jaxdiff.models.model import FAMILIES
from jaxdiff.typing import Params

Table = Mapping[str, tuple[str, ...]]  # their layer -> ours, one behind the other
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
SCALES = (".scale", ".weight")  # how their files end the names of norms


def _qkv(theirs: str, ours: str, names: tuple[str, ...] = ("to_q", "to_k", "to_v")) -> Table:
    return {theirs: tuple(f"{ours}.{name}" for name in names)}


def _flux_block(old: str, new: str, kind: str, context: str, added: tuple[str, ...]) -> Table:
    """One half of a double block, of the image or of the text."""
    q, k, out = ("norm_q", "norm_k", "to_out.0") if kind == "img" else ("norm_added_q", "norm_added_k", "to_add_out")
    return {
        **_qkv(f"{old}.{kind}_attn.qkv", f"{new}.attn", added),
        f"{old}.{kind}_attn.norm.query_norm": (f"{new}.attn.{q}",),
        f"{old}.{kind}_attn.norm.key_norm": (f"{new}.attn.{k}",),
        f"{old}.{kind}_attn.proj": (f"{new}.attn.{out}",),
        f"{old}.{kind}_mod.lin": (f"{new}.norm1{context}.linear",),
        f"{old}.{kind}_mlp.0": (f"{new}.ff{context}.net.0.proj", f"{new}.ff{context}.linear_in"),
        f"{old}.{kind}_mlp.2": (f"{new}.ff{context}.net.2", f"{new}.ff{context}.linear_out"),
    }


def _vectors(time: str) -> Table:
    pairs = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
    return {
        f"{old}.{part}_layer": (f"{time}.{new}.linear_{number}",)
        for old, new in pairs.items()
        for part, number in (("in", 1), ("out", 2))
    }


_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_ENDS: Table = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_BLOCKS: Table = {
    **_ENDS,
    **_flux_block("double_blocks.#", _DOUBLE, "img", "", ("to_q", "to_k", "to_v")),
    **_flux_block("double_blocks.#", _DOUBLE, "txt", "_context", _ADDED),
    "single_blocks.#.norm.query_norm": (f"{_SINGLE}.attn.norm_q",),
    "single_blocks.#.norm.key_norm": (f"{_SINGLE}.attn.norm_k",),
}
_Z_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")
TABLES: dict[str, Table] = {
    "flux": {
        **_BLOCKS,
        **_vectors("time_text_embed"),
        **_qkv("single_blocks.#.linear1", _SINGLE, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        "single_blocks.#.linear2": (f"{_SINGLE}.proj_out",),
        "single_blocks.#.modulation.lin": (f"{_SINGLE}.norm.linear",),
    },
    "flux2": {
        **_BLOCKS,
        **_vectors("time_guidance_embed"),
        "single_blocks.#.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
        "single_blocks.#.linear2": (f"{_SINGLE}.attn.to_out",),
        **{
            f"{name}.lin": (f"{name}.linear",)
            for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        },
    },
    "sd3": {
        "pos_embed": ("pos_embed.pos_embed",),
        "x_embedder.proj": ("pos_embed.proj",),
        **{
            f"{old}.mlp.{place}": (f"time_text_embed.{new}.linear_{number}",)
            for old, new in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for place, number in ((0, 1), (2, 2))
        },
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        **{
            f"joint_blocks.#.{block}.{old}": (f"{_DOUBLE}.{new}",)
            for block, layers in {
                "x_block": {
                    "adaLN_modulation.1": "norm1.linear", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
                    "attn.proj": "attn.to_out.0", "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k",
                    "attn2.proj": "attn2.to_out.0", "attn2.ln_q": "attn2.norm_q", "attn2.ln_k": "attn2.norm_k",
                },
                "context_block": {
                    "adaLN_modulation.1": "norm1_context.linear", "mlp.fc1": "ff_context.net.0.proj",
                    "mlp.fc2": "ff_context.net.2", "attn.proj": "attn.to_add_out",
                    "attn.ln_q": "attn.norm_added_q", "attn.ln_k": "attn.norm_added_k",
                },
            }.items()
            for old, new in layers.items()
        },
        **_qkv("joint_blocks.#.x_block.attn.qkv", f"{_DOUBLE}.attn"),
        **_qkv("joint_blocks.#.x_block.attn2.qkv", f"{_DOUBLE}.attn2"),
        **_qkv("joint_blocks.#.context_block.attn.qkv", f"{_DOUBLE}.attn", _ADDED),
    },
    "z_image": {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        **{
            f"{block}.attention.{old}": tuple(f"{block}.attention.{name}" for name in new)
            for block in _Z_BLOCKS
            for old, new in {
                "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",), "q_norm": ("norm_q",), "k_norm": ("norm_k",),
            }.items()
        },
    },
}  # fmt: skip


class Piece(NamedTuple):
    """Where one of our layers is in theirs."""

    name: str  # of their layer
    start: int  # its first row there
    whole: bool  # whether it is all of it
    swapped: bool  # whether its halves change places


def pieces(family: str, rows: Mapping[str, int]) -> dict[str, Piece]:
    """Where each of our layers is.

    Args:
        family: a key of `TABLES`.
        rows: of each of our layers, by its PyTorch name without `.weight`: the outputs of its weight.
    """
    where = {ours: (theirs, group) for theirs, group in TABLES[family].items() for ours in group}
    width = rows.get("context_embedder", 0)
    found = {}
    for name in rows:
        number = re.search(r"\.(\d+)\.", name)
        general = name if number is None else f"{name[: number.start(1)]}#{name[number.end(1) :]}"
        if general not in where:
            general, number = name, None
        theirs, group = where.get(general, (name, (general,)))

        def called(text: str, number=number) -> str:
            return text if number is None else text.replace("#", number[1])

        own = [called(ours) for ours in group if called(ours) in rows]
        start = sum(rows[ours] for ours in own[: own.index(name)])
        last = name.endswith("norm1_context.linear") and rows[name] == 2 * width
        swapped = name == "norm_out.linear" or (family == "sd3" and last)
        found[name] = Piece(called(theirs), start, len(own) == 1, swapped)
    return found


def rows_of_theirs(found: Mapping[str, Piece], rows: Mapping[str, int]) -> dict[str, int]:
    """The outputs of each of their layers: those of ours that it holds, together."""
    sums: dict[str, int] = {}
    for ours, piece in found.items():
        sums[piece.name] = max(sums.get(piece.name, 0), piece.start + rows[ours])
    return sums


def swap_halves(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2)
    return np.concatenate([second, first])


def _own_names(source: TensorSource) -> dict[str, str]:
    """The names of a transformer's tensors without the prefix that stands before them -> those in the file."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in source.shapes)), "")
    return {name.removeprefix(prefix): name for name in source.shapes if name.startswith(prefix)}


def as_diffusers(source: TensorSource, family: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorSource:
    """A transformer's file in diffusers' names and pieces; one that has them already as it is.

    What lies beside the transformer in a whole checkpoint is passed over.

    Args:
        shapes: of our tensors, by their PyTorch names.
    """
    there = _own_names(source)
    layers = {name.rpartition(".")[0] if "." in name else name: shape for name, shape in shapes.items()}
    rows = {layer: shape[0] for layer, shape in layers.items() if layer}
    places: dict[str, tuple[str, Piece, int]] = {}  # our tensor -> theirs, and its place there
    found, read_shapes = pieces(family, rows), dict[str, list[int]]()
    sums = rows_of_theirs(found, rows)
    for name, shape in shapes.items():
        layer, dot, last = name.rpartition(".")
        piece = found.get(layer or name, Piece(name, 0, True, False))
        if name == "pos_embed.pos_embed":
            piece, last, dot = Piece("pos_embed", 0, True, False), "", ""
        names = [f"{piece.name}{dot}{last}", *(piece.name + end for end in SCALES if last == "weight")]
        theirs = next((n for n in (name, *names) if n in there), None)
        if theirs is None:
            continue
        if theirs == name:
            piece = Piece(name, 0, True, False)
        places[name] = there[theirs], piece, shape[0] if shape else 1
        whole = source.shapes[there[theirs]]
        divides = not piece.whole and whole[0] == sums[piece.name]  # else the reader says that it does not fit
        read_shapes[name] = [shape[0], *whole[1:]] if divides else list(whole)
    used = {theirs for theirs, _, _ in places.values()}
    # What has no place is said by the reader; "norm_final" is of another version of Z-Image.
    strays = {n: name for n, name in there.items() if name not in used and n != "norm_final.weight"}

    def read(name: str) -> np.ndarray:
        if name in strays:
            return source.read(strays[name])
        theirs, piece, count = places[name]
        x = source.read(theirs)
        x = x if piece.whole else x[piece.start : piece.start + count]
        return swap_halves(x) if piece.swapped else x

    rest = {n: source.shapes[name] for n, name in strays.items()}
    return dataclasses.replace(source, shapes={**read_shapes, **rest}, read=read)


COUNTS = {  # what of a config a file says: the blocks' names in either layout
    "num_layers": r"(?:double_blocks|joint_blocks|transformer_blocks)\.(\d+)\.",
    "num_single_layers": r"(?:single_blocks|single_transformer_blocks)\.(\d+)\.",
    "n_layers": r"layers\.(\d+)\.",
    "n_refiner_layers": r"(?:noise_refiner)\.(\d+)\.",
}
ONES = {  # a layer that only files of a family have, in either layout
    "flux": r"(double_blocks|transformer_blocks)\.0\.(img_mod\.lin|norm1\.linear)\.",
    "flux2": r"double_stream_modulation_img\.",
    "sd3": r"(joint_blocks\.0\.|pos_embed\.proj\.)",
    "z_image": r"cap_embedder\.",
}
# Of files whose numbers mean something with scales alone that lie beside them: ComfyUI's, bitsandbytes'.
QUANTISED = r"\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|absmax|quant_map)$|^(.*\.)?scaled_fp8$"
GUIDED = ("guidance_in.", "time_text_embed.guidance_embedder.")


def family_of(names: list[str]) -> str | None:
    """Whose transformer a file holds."""
    return next((f for f in ("sd3", "flux2", "z_image", "flux") if any(re.match(ONES[f], n) for n in names)), None)


def described_transformer(source: TensorSource, config: Any) -> Any:
    """The config of a transformer's file: `config`, of the same family, with the number of blocks in the file.

    Raises:
        WeightsError: the file holds no transformer of this family, or an unsupported one.
    """
    if scale := next((name for name in source.shapes if re.search(QUANTISED, name)), None):
        raise WeightsError(
            f"{source.path} is quantised with scales of its own ({scale}), which are not read: give a file in "
            "bfloat16, fp8 or GGUF."
        )
    names = list(_own_names(source))
    wanted, found = FAMILIES[type(config)], family_of(names)
    if found != wanted:
        what = f"a transformer of {found}" if found else "no transformer that is known here"
        raise WeightsError(f"{source.path} holds {what}, and the folder's is of {wanted}: give one of the same family.")
    changes: dict[str, Any] = {}
    for field, pattern in COUNTS.items():
        numbers = [int(match[1]) for name in names if (match := re.match(pattern, name))]
        if hasattr(config, field) and numbers:
            changes[field] = max(numbers) + 1
    if hasattr(config, "guidance_embeds"):
        changes["guidance_embeds"] = any(name.startswith(GUIDED) for name in names)
    return dataclasses.replace(config, **changes)


def transformer_source(source: TensorSource, family: str, shapes: Params) -> TensorSource:
    """A transformer's file of either layout, for `load_tensors`."""
    ours = {tensor_name(path): torch_shape(path, leaf.shape) for path, leaf in flatten_dict(shapes).items()}
    return as_diffusers(source, family, ours)
