"""The transformers' original layouts, which their authors, ComfyUI and kohya's scripts use.

They fuse several of our layers: queries, keys and values, and in FLUX.1's single blocks also the feed-forward's first
layer. A table maps each of their layers to ours, with `#` for a block's number; names in no table are the same in both.
The last modulation is (shift, scale) in the original layout and (scale, shift) in diffusers' files.
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

Table = Mapping[str, tuple[str, ...]]  # their layer -> ours, in the order of their rows
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
SCALES = (".scale", ".weight")  # suffixes of norms' weights in their files


def _qkv(theirs: str, ours: str, names: tuple[str, ...] = ("to_q", "to_k", "to_v")) -> Table:
    return {theirs: tuple(f"{ours}.{name}" for name in names)}


def _flux_block(old: str, new: str, kind: str, context: str, added: tuple[str, ...]) -> Table:
    """The image or text half of a double block."""
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
    """Where one of our layers is stored in theirs."""

    name: str  # of their layer
    start: int  # first row in their layer
    whole: bool  # whether it is the whole layer
    swapped: bool  # whether its halves are swapped


def pieces(family: str, rows: Mapping[str, int]) -> dict[str, Piece]:
    """Where each of our layers is stored.

    Args:
        family: a key of `TABLES`.
        rows: the number of outputs of each of our layers, by its PyTorch name without `.weight`.
    """
    locations = {ours: (theirs, group) for theirs, group in TABLES[family].items() for ours in group}
    width = rows.get("context_embedder", 0)
    located = {}
    for name in rows:
        number = re.search(r"\.(\d+)\.", name)
        template = name if number is None else f"{name[: number.start(1)]}#{name[number.end(1) :]}"
        if template not in locations:
            template, number = name, None
        theirs, group = locations.get(template, (name, (template,)))

        def numbered(text: str, number=number) -> str:
            return text if number is None else text.replace("#", number[1])

        members = [numbered(ours) for ours in group if numbered(ours) in rows]
        start = sum(rows[ours] for ours in members[: members.index(name)])
        is_last_context = name.endswith("norm1_context.linear") and rows[name] == 2 * width
        swapped = name == "norm_out.linear" or (family == "sd3" and is_last_context)
        located[name] = Piece(numbered(theirs), start, len(members) == 1, swapped)
    return located


def total_rows(located: Mapping[str, Piece], rows: Mapping[str, int]) -> dict[str, int]:
    """The number of outputs of each of their layers, the sum of ours that it holds."""
    sums: dict[str, int] = {}
    for ours, piece in located.items():
        sums[piece.name] = max(sums.get(piece.name, 0), piece.start + rows[ours])
    return sums


def swap_halves(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2)
    return np.concatenate([second, first])


def _file_names(source: TensorSource) -> dict[str, str]:
    """The names of a transformer's tensors without the file's prefix -> the names in the file."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in source.shapes)), "")
    return {name.removeprefix(prefix): name for name in source.shapes if name.startswith(prefix)}


def as_diffusers(source: TensorSource, family: str, shapes: Mapping[str, tuple[int, ...]]) -> TensorSource:
    """A transformer's file of either layout in diffusers' names and shapes, without the rest of a whole checkpoint.

    Args:
        shapes: of our tensors, by PyTorch name.
    """
    file_names = _file_names(source)
    layers = {name.rpartition(".")[0] if "." in name else name: shape for name, shape in shapes.items()}
    rows = {layer: shape[0] for layer, shape in layers.items() if layer}
    places: dict[str, tuple[str, Piece, int]] = {}  # our tensor -> theirs, its piece, its number of rows
    located, read_shapes = pieces(family, rows), dict[str, list[int]]()
    sums = total_rows(located, rows)
    for name, shape in shapes.items():
        layer, dot, ending = name.rpartition(".")
        piece = located.get(layer or name, Piece(name, 0, True, False))
        if name == "pos_embed.pos_embed":
            piece, ending, dot = Piece("pos_embed", 0, True, False), "", ""
        names = [f"{piece.name}{dot}{ending}", *(piece.name + end for end in SCALES if ending == "weight")]
        theirs = next((n for n in (name, *names) if n in file_names), None)
        if theirs is None:
            continue
        if theirs == name:
            piece = Piece(name, 0, True, False)
        places[name] = file_names[theirs], piece, shape[0] if shape else 1
        file_shape = source.shapes[file_names[theirs]]
        is_divided = not piece.whole and file_shape[0] == sums[piece.name]  # else the reader reports the wrong shape
        read_shapes[name] = [shape[0], *file_shape[1:]] if is_divided else list(file_shape)
    used = {theirs for theirs, _, _ in places.values()}
    # The reader reports unknown tensors; "norm_final" is of another version of Z-Image.
    strays = {n: name for n, name in file_names.items() if name not in used and n != "norm_final.weight"}

    def read(name: str) -> np.ndarray:
        if name in strays:
            return source.read(strays[name])
        theirs, piece, count = places[name]
        x = source.read(theirs)
        x = x if piece.whole else x[piece.start : piece.start + count]
        return swap_halves(x) if piece.swapped else x

    stray_shapes = {n: source.shapes[name] for n, name in strays.items()}
    return dataclasses.replace(source, shapes={**read_shapes, **stray_shapes}, read=read)


COUNTS = {  # config field -> pattern of the numbered blocks' names in either layout
    "num_layers": r"(?:double_blocks|joint_blocks|transformer_blocks)\.(\d+)\.",
    "num_single_layers": r"(?:single_blocks|single_transformer_blocks)\.(\d+)\.",
    "n_layers": r"layers\.(\d+)\.",
    "n_refiner_layers": r"(?:noise_refiner)\.(\d+)\.",
}
MARKERS = {  # a layer that only this family has, in either layout
    "flux": r"(double_blocks|transformer_blocks)\.0\.(img_mod\.lin|norm1\.linear)\.",
    "flux2": r"double_stream_modulation_img\.",
    "sd3": r"(joint_blocks\.0\.|pos_embed\.proj\.)",
    "z_image": r"cap_embedder\.",
}
# Files whose numbers need scales stored beside them: ComfyUI's, bitsandbytes'.
QUANTISED = r"\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|absmax|quant_map)$|^(.*\.)?scaled_fp8$"
GUIDED = ("guidance_in.", "time_text_embed.guidance_embedder.")


def family_of(names: list[str]) -> str | None:
    """The family of a file's transformer, or None."""
    return next((f for f in ("sd3", "flux2", "z_image", "flux") if any(re.match(MARKERS[f], n) for n in names)), None)


def described_transformer(source: TensorSource, config: Any) -> Any:
    """The config of a transformer's file: `config`, of the same family, with the file's number of blocks.

    Raises:
        WeightsError: the file holds no transformer of this family, or an unsupported one.
    """
    if scale := next((name for name in source.shapes if re.search(QUANTISED, name)), None):
        raise WeightsError(
            f"{source.path} is quantised with scales of its own ({scale}), which are not read: give a file in "
            "bfloat16, fp8 or GGUF."
        )
    names = list(_file_names(source))
    expected, family = FAMILIES[type(config)], family_of(names)
    if family != expected:
        content = f"a transformer of {family}" if family else "no transformer that is known here"
        raise WeightsError(
            f"{source.path} holds {content}, and the folder's is of {expected}: give one of the same family."
        )
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
