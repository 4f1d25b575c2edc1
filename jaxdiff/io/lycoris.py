"""What the adapters of LyCORIS other than LoRA add to a kernel (Yeh et al. 2023, arXiv:2309.14859, section 3).

    LoHa          (w1_a @ w1_b) * (w2_a @ w2_b), element by element                                      (1)
    LoKr          kron(w1, w2), either of which may be a product of two                                  (2)
    a difference  the change itself
    GLoRA         kernel @ a1 @ a2 + b1 @ b2, with a1 and a2 over the inputs
    (IA)³         kernel * w, with one number for each output or each input
    OFT, BOFT     see jaxdiff/io/rotations.py

times alpha / rank if a product has a rank, and times a learned scalar. For a convolution, a product may have three
factors,

    sum over i, j of w_a[i, out] * t[i, j, height, width] * w_b[j, in]                                   (3)

All but OFT and BOFT are proportional to the scale. The parts of a change keep the file's dtype and are multiplied in
float32 when it is added.
"""

import functools
import math
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.io import rotations
from jaxdiff.typing import Array

# A part's role -> pattern at the end of its tensor's name.
ROLES = {
    **{f"hada_{x}": rf"\.hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": rf"\.lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": r"\.diff|\.w_norm",
    **{x: rf"\.{x}\.weight" for x in ("a1", "a2", "b1", "b2", "bm")},
    **{x: rf"\.{x}" for x in ("oft_blocks", "rescale", "on_input")},
    "oft_R": r"\.oft_R(?:\.[^.]+)?\.weight",
    **{x: rf"\.{x}(?:\.[^.]+)?" for x in ("boft_R", "boft_s", "ia3_l")},
}
PARTS = (*ROLES, "ia3_weight")  # the latter is a `.weight` next to an `.on_input`
OPEN = "LoRA, LoCon, LoHa, LoKr, DoRA, OFT, BOFT, GLoRA or (IA)³"
_GLORA, _BOFT = ("a1", "a2", "b1", "b2"), ("boft_R", "boft_s")
NEEDED = {  # a part of an adapter that depends on the kernel -> the parts that it requires
    **dict.fromkeys((*_GLORA, "bm"), _GLORA),
    **dict.fromkeys(_BOFT, _BOFT),
    **dict.fromkeys(("oft_blocks", "rescale"), ("oft_blocks",)),
    **{"oft_R": (), "ia3_l": (), "ia3_weight": ("on_input",), "on_input": ("ia3_weight",)},
}
IA3 = {"ia3_out": 0, "ia3_in": 1}  # role of (IA)³'s numbers after reading -> axis of the weight
SCALAR = "scalar"
_product = functools.partial(jnp.einsum, precision="highest")


def kinds(roles: Set[str]) -> list[str]:
    """The kinds of adapters that have tensors of these roles."""
    names = {"hada": "LoHa", "lokr": "LoKr", "diff": "a difference", "down": "LoRA", "up": "LoRA"}
    names |= {**dict.fromkeys((*_GLORA, "bm"), "GLoRA"), "oft": "OFT", "rescale": "OFT", "boft": "BOFT"}
    names |= {"ia3": "(IA)³", "on": "(IA)³", "oft_R": "OFT of peft", "ia3_l": "(IA)³ of peft"}
    if roles & NEEDED.keys():  # cannot be combined with these
        names |= {"magnitude": "DoRA", SCALAR: "a scalar"} | ({"bias": "a bias"} if "ia3_l" in roles else {})
    return sorted({kind for role in roles if (kind := names.get(role, names.get(role.partition("_")[0])))})


def missing(roles: Set[str]) -> str | None:
    """A part that is missing from an adapter's parts, or None."""
    if roles & NEEDED.keys():
        needed = [x for role in sorted(roles) for x in NEEDED.get(role, ())]
    elif any(role.startswith("hada") for role in roles):
        needed = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        needed += ["hada_t1", "hada_t2"] if roles & {"hada_t1", "hada_t2"} else []
    else:
        needed = []
        for i in "12":
            parts = {role for role in roles if role.startswith(f"lokr_w{i}_") or role == f"lokr_t{i}"}
            needed += [f"lokr_w{i}_a", f"lokr_w{i}_b"] if parts else [f"lokr_w{i}"]
        needed = needed if any(role.startswith("lokr") for role in roles) else []
    return next((role for role in needed if role not in roles), None)


def rank(shapes: Mapping[str, Any]) -> int | None:
    """The rank, by which alpha is divided; None if no part is a product."""
    roles = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2")
    return next((int(shapes[role][0]) for role in roles if role in shapes), None)


def current_names(tensors: dict[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """A layer's tensors by LyCORIS' current names: the first GLoRAs were kernel @ a2 @ a1 + b2 @ b1."""
    if not tensors.keys() >= {*_GLORA}:
        return tensors
    sizes = [tuple(shapes[tensors[role]]) for role in _GLORA]
    if any(len(size) < 2 for size in sizes) or not sizes[0][0] == sizes[1][1] == sizes[2][0] == sizes[3][1]:
        return tensors
    swapped = dict(zip(_GLORA, ("a2", "a1", "b2", "b1"), strict=True)) if sizes[0][0] < sizes[0][1] else {}
    return tensors | {role: tensors[other] for role, other in swapped.items()}


def change(parts: Mapping[str, Array], weight: jax.Array, scale: Any = 1.0) -> jax.Array:
    """What an adapter adds to a weight at a scale, without alpha.

    Args:
        parts: by role.
        weight: float32, in PyTorch's layout.

    Returns:
        The change in PyTorch's layout, or with all axes but the first flattened.
    """
    tensors = {role: jnp.asarray(part, jnp.float32) for role, part in parts.items()}
    if not tensors.keys().isdisjoint(rotations.BLOCKS):
        delta = rotations.rotate(tensors, weight, scale) - weight
        # Scale 0 changes nothing, even with learned sizes of the outputs.
        return jnp.where(jnp.equal(scale, 0), 0, delta) if tensors.keys() & {"rescale", "boft_s"} else delta
    return scale * _delta(tensors, weight)


def _delta(x: Mapping[str, jax.Array], weight: jax.Array) -> jax.Array:
    if axes := [axis for role, axis in IA3.items() if role in x]:
        sizes = [n if i == axes[0] else 1 for i, n in enumerate(weight.shape)]
        return weight * next(iter(x.values())).reshape(sizes)
    if "a1" in x:
        a1, a2, b1, b2 = (x[role].reshape(len(x[role]), -1) for role in _GLORA)
        added = _product("im,mn...,nj->ij...", b1, x["bm"], b2) if "bm" in x else _product("ir,rj->ij", b1, b2)
        return _product("oi...,ir,rj->oj...", weight, a1, a2) + added.reshape(weight.shape)
    if "hada_w1_a" in x:
        delta = _factor(x, "hada", 1) * _factor(x, "hada", 2)
    elif "diff" in x:
        delta = x["diff"]
    else:
        w1, w2 = _factor(x, "lokr", 1), _factor(x, "lokr", 2)
        delta = jnp.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2)
    return delta * x[SCALAR].reshape(()) if SCALAR in x else delta


def _factor(x: Mapping[str, jax.Array], kind: str, i: int) -> jax.Array:
    """The factor w_i, multiplied out if it is stored as a product."""
    if (factor := x.get(f"{kind}_w{i}")) is not None:
        return factor
    a, b = x[f"{kind}_w{i}_a"], x[f"{kind}_w{i}_b"]
    if (t := x.get(f"{kind}_t{i}")) is not None:
        return _product("ia,ij...,jb->ab...", a, t, b)
    return _product("ai,ib->ab", a, b)


def fits(shapes: Mapping[str, Any], weight: tuple[int, ...]) -> bool:
    """Whether parts of these shapes fit a weight, [out, in, …] in PyTorch's layout."""
    if ia3 := [tuple(shapes[role]) for role in ("ia3_weight", "ia3_l") if role in shapes]:
        return (
            math.prod(ia3[0]) == max(ia3[0], default=0) and math.prod(ia3[0]) in weight[:2]
        )  # which: see `_read_parts`
    structs = {role: jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for role, shape in shapes.items()}
    try:
        if "oft_R" in structs:
            size = rotations.unpacked_shape(structs["oft_R"].shape, math.prod(weight[1:]))
            structs["oft_R"] = jax.ShapeDtypeStruct(size, jnp.float32)
        delta_shape = jax.eval_shape(change, structs, jax.ShapeDtypeStruct(weight, jnp.float32)).shape
    except (KeyError, TypeError, ValueError):  # the parts do not fit each other
        return False
    if rank(shapes) == 0:
        return False
    return len(delta_shape) > 1 and delta_shape[0] == weight[0] and math.prod(delta_shape[1:]) == math.prod(weight[1:])


def to_tensors(parts: Mapping[str, np.ndarray], scale: float, axes: int) -> dict[str, np.ndarray] | None:
    """The tensors of a layer by the endings of their names, with the alpha that corresponds to `scale`.

    Without a rank, one part is multiplied by the scale.

    Args:
        axes: number of axes of its weight.

    Returns:
        None for adapters that only peft has names for.
    """
    if parts.keys() & {"oft_R", "boft_R"} or (axes == 1 and "diff" not in parts):
        return None
    if ia3 := [role for role in parts if role in IA3]:
        (array,) = parts.values()
        size = (array.size,) if axes == 2 else (1, array.size, *(1,) * (axes - 2))
        return {"weight": array.reshape(size), "on_input": np.asarray(IA3[ia3[0]])}
    tensors = {
        f"{role}{'.weight' if role in (*_GLORA, 'bm') else ''}": np.asarray(array) for role, array in parts.items()
    }
    if (divisor := rank({role: array.shape for role, array in parts.items()})) is not None:
        return tensors | {"alpha": np.asarray(scale * divisor, np.float32)}
    name = next(name for name in tensors if not name.endswith(SCALAR))
    return tensors | {name: (tensors[name] * np.float32(scale)).astype(tensors[name].dtype)}
