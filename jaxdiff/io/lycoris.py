"""Adapters of LyCORIS other than LoRA (Yeh et al. 2023, arXiv:2309.14859, section 3): what they change a kernel by.

    LoHa          (w1_a @ w1_b) * (w2_a @ w2_b), element by element                                      (1)
    LoKr          kron(w1, w2), either of them perhaps a product of two                                  (2)
    a difference  the change itself
    GLoRA         kernel @ a1 @ a2 + b1 @ b2, a1 and a2 over the inputs alone
    (IA)³         kernel * w, a number for each output or each input
    OFT, BOFT     see jaxdiff/io/rotations.py

times alpha / rank where a product has a rank, and times a learned scalar. Of a convolution, a product may be of three,

    sum over i, j of w_a[i, out] * t[i, j, height, width] * w_b[j, in]                                   (3)

At a scale all but OFT and BOFT change as much more or less. The parts of a change keep the file's type and are
multiplied where it is added, in float32.
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

# A part's role -> how the name of its tensor ends.
ROLES = {
    **{f"hada_{x}": rf"\.hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": rf"\.lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": r"\.diff|\.w_norm",
    **{x: rf"\.{x}\.weight" for x in ("a1", "a2", "b1", "b2", "bm")},
    **{x: rf"\.{x}" for x in ("oft_blocks", "rescale", "on_input")},
    "oft_R": r"\.oft_R(?:\.[^.]+)?\.weight",
    **{x: rf"\.{x}(?:\.[^.]+)?" for x in ("boft_R", "boft_s", "ia3_l")},
}
PARTS = (*ROLES, "ia3_weight")  # a name that ends in `.weight` is the latter's beside an `.on_input` only
OPEN = "LoRA, LoCon, LoHa, LoKr, DoRA, OFT, BOFT, GLoRA or (IA)³"
_GLORA, _BOFT = ("a1", "a2", "b1", "b2"), ("boft_R", "boft_s")
NEEDED = {  # a part of what depends on the kernel -> those without which it is no whole change
    **dict.fromkeys((*_GLORA, "bm"), _GLORA),
    **dict.fromkeys(_BOFT, _BOFT),
    **dict.fromkeys(("oft_blocks", "rescale"), ("oft_blocks",)),
    **{"oft_R": (), "ia3_l": (), "ia3_weight": ("on_input",), "on_input": ("ia3_weight",)},
}
IA3 = {"ia3_out": 0, "ia3_in": 1}  # what becomes of (IA)³'s when read -> the axis of the weight that it is of
SCALAR = "scalar"
_product = functools.partial(jnp.einsum, precision="highest")


def kinds(roles: Set[str]) -> list[str]:
    """The kinds of adapter that a layer has tensors of, where it has these roles."""
    names = {"hada": "LoHa", "lokr": "LoKr", "diff": "a difference", "down": "LoRA", "up": "LoRA"}
    names |= {**dict.fromkeys((*_GLORA, "bm"), "GLoRA"), "oft": "OFT", "rescale": "OFT", "boft": "BOFT"}
    names |= {"ia3": "(IA)³", "on": "(IA)³", "oft_R": "OFT of peft", "ia3_l": "(IA)³ of peft"}
    if roles & NEEDED.keys():  # nothing says what these would do to one
        names |= {"magnitude": "DoRA", SCALAR: "a scalar"} | ({"bias": "a bias"} if "ia3_l" in roles else {})
    return sorted({kind for role in roles if (kind := names.get(role, names.get(role.partition("_")[0])))})


def missing(roles: Set[str]) -> str | None:
    """A part without which these are no whole change; None where nothing is missing, or all of it."""
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
    """What alpha is divided by; None where no part is a product."""
    roles = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2")
    return next((int(shapes[role][0]) for role in roles if role in shapes), None)


def current(tensors: dict[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """A layer's tensors as LyCORIS names them today: the first GLoRAs were kernel @ a2 @ a1 + b2 @ b1."""
    if not tensors.keys() >= {*_GLORA}:
        return tensors
    sizes = [tuple(shapes[tensors[role]]) for role in _GLORA]
    if any(len(size) < 2 for size in sizes) or not sizes[0][0] == sizes[1][1] == sizes[2][0] == sizes[3][1]:
        return tensors
    swapped = dict(zip(_GLORA, ("a2", "a1", "b2", "b1"), strict=True)) if sizes[0][0] < sizes[0][1] else {}
    return tensors | {role: tensors[other] for role, other in swapped.items()}


def change(parts: Mapping[str, Array], weight: jax.Array, scale: Any = 1.0) -> jax.Array:
    """What parts change a weight by at a scale, in PyTorch's layout or flattened but for its outputs, without alpha.

    Args:
        weight: float32, in PyTorch's layout.
    """
    x = {role: jnp.asarray(part, jnp.float32) for role, part in parts.items()}
    if not x.keys().isdisjoint(rotations.BLOCKS):
        found = rotations.rotated(x, weight, scale) - weight
        # 0 changes nothing, whatever the sizes of outputs.
        return jnp.where(jnp.equal(scale, 0), 0, found) if x.keys() & {"rescale", "boft_s"} else found
    return scale * _change(x, weight)


def _change(x: Mapping[str, jax.Array], weight: jax.Array) -> jax.Array:
    if axis := [axis for role, axis in IA3.items() if role in x]:
        sizes = [n if i == axis[0] else 1 for i, n in enumerate(weight.shape)]
        return weight * next(iter(x.values())).reshape(sizes)
    if "a1" in x:
        a1, a2, b1, b2 = (x[role].reshape(len(x[role]), -1) for role in _GLORA)
        added = _product("im,mn...,nj->ij...", b1, x["bm"], b2) if "bm" in x else _product("ir,rj->ij", b1, b2)
        return _product("oi...,ir,rj->oj...", weight, a1, a2) + added.reshape(weight.shape)
    if "hada_w1_a" in x:
        found = _whole(x, "hada", 1) * _whole(x, "hada", 2)
    elif "diff" in x:
        found = x["diff"]
    else:
        first, second = _whole(x, "lokr", 1), _whole(x, "lokr", 2)
        found = jnp.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)
    return found * x[SCALAR].reshape(()) if SCALAR in x else found


def _whole(x: Mapping[str, jax.Array], kind: str, i: int) -> jax.Array:
    """w_i, or the product that it is."""
    if (whole := x.get(f"{kind}_w{i}")) is not None:
        return whole
    a, b = x[f"{kind}_w{i}_a"], x[f"{kind}_w{i}_b"]
    if (t := x.get(f"{kind}_t{i}")) is not None:
        return _product("ia,ij...,jb->ab...", a, t, b)
    return _product("ai,ib->ab", a, b)


def fits(shapes: Mapping[str, Any], weight: tuple[int, ...]) -> bool:
    """Whether parts of these shapes make a change of a weight, [out, in, …] as PyTorch has it."""
    if ia3 := [tuple(shapes[role]) for role in ("ia3_weight", "ia3_l") if role in shapes]:
        return math.prod(ia3[0]) == max(ia3[0], default=0) and math.prod(ia3[0]) in weight[:2]  # which: once it is read
    given = {role: jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for role, shape in shapes.items()}
    try:
        if "oft_R" in given:
            size = rotations.unpacked(given["oft_R"].shape, math.prod(weight[1:]))
            given["oft_R"] = jax.ShapeDtypeStruct(size, jnp.float32)
        found = jax.eval_shape(change, given, jax.ShapeDtypeStruct(weight, jnp.float32)).shape
    except (KeyError, TypeError, ValueError):  # parts that do not go together
        return False
    if rank(shapes) == 0:
        return False
    return len(found) > 1 and found[0] == weight[0] and math.prod(found[1:]) == math.prod(weight[1:])


def written(parts: Mapping[str, np.ndarray], scale: float, axes: int) -> dict[str, np.ndarray] | None:
    """How the names of a layer's tensors end -> what they hold, with the alpha that means `scale`.

    Without a rank, one part holds the scale.

    Args:
        axes: of its weight.

    Returns:
        None for what no program but peft has a name for.
    """
    if parts.keys() & {"oft_R", "boft_R"} or (axes == 1 and "diff" not in parts):
        return None
    if ia3 := [role for role in parts if role in IA3]:
        (x,) = parts.values()
        size = (x.size,) if axes == 2 else (1, x.size, *(1,) * (axes - 2))
        return {"weight": x.reshape(size), "on_input": np.asarray(IA3[ia3[0]])}
    found = {f"{role}{'.weight' if role in (*_GLORA, 'bm') else ''}": np.asarray(x) for role, x in parts.items()}
    if (own := rank({role: x.shape for role, x in parts.items()})) is not None:
        return found | {"alpha": np.asarray(scale * own, np.float32)}
    name = next(name for name in found if not name.endswith(SCALAR))
    return found | {name: (found[name] * np.float32(scale)).astype(found[name].dtype)}
