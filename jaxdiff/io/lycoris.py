"""Adapters of LyCORIS other than LoRA (Yeh et al. 2023, arXiv:2309.14859, section 3): what they change a kernel by.

    LoHa          (w1_a @ w1_b) * (w2_a @ w2_b), element by element                                      (1)
    LoKr          kron(w1, w2), either of them perhaps a product of two                                  (2)
    a difference  the change itself

times alpha / rank where a product has a rank, and times a learned scalar. Of a convolution, a product may be of three,

    sum over i, j of w_a[i, out] * t[i, j, height, width] * w_b[j, in]                                   (3)

The parts of a change keep the file's type and are multiplied where it is added, in float32.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.typing import Array

# A part's role -> how the name of its tensor ends.
ROLES = {
    **{f"hada_{x}": rf"\.hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": rf"\.lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": r"\.diff|\.w_norm",
}
SCALAR = "scalar"
_product = functools.partial(jnp.einsum, precision="highest")


def missing(roles: set[str]) -> str | None:
    """A part without which these are no whole change; None where nothing is missing, or all of it."""
    if any(role.startswith("hada") for role in roles):
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
    return next((int(shapes[role][0]) for role in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in shapes), None)


def change(parts: Mapping[str, Array]) -> jax.Array:
    """What parts change a weight by, in PyTorch's layout or flattened but for its outputs, without alpha: float32."""
    x = {role: jnp.asarray(part, jnp.float32) for role, part in parts.items()}
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
    given = {role: jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for role, shape in shapes.items()}
    try:
        found = jax.eval_shape(change, given).shape
    except (KeyError, TypeError, ValueError):  # parts that do not go together
        return False
    if rank(shapes) == 0:
        return False
    return len(found) > 1 and found[0] == weight[0] and math.prod(found[1:]) == math.prod(weight[1:])


def written(stem: str, parts: Mapping[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """The tensors of a layer of that name, with the alpha that means `scale`; without a rank, one part holds it."""
    found = {f"{stem}.{role}": np.asarray(x) for role, x in parts.items()}
    if (own := rank({role: x.shape for role, x in parts.items()})) is not None:
        return found | {f"{stem}.alpha": np.asarray(scale * own, np.float32)}
    name = next(name for name in found if not name.endswith(SCALAR))
    return found | {name: (found[name] * np.float32(scale)).astype(found[name].dtype)}
