"""Adapters that rotate a weight (OFT, Qiu et al. 2023, arXiv:2306.07280; BOFT, Liu et al. 2024, arXiv:2311.06243).

A rotation of a block is Cayley's of a skew-symmetric Q,

    R = (I + Q) (I - Q)^-1                                                                               (1)

OFT multiplies by one block-diagonal matrix of such R. BOFT multiplies by several, and before each orders the rows anew,
so that blocks ever further apart are mixed. In files of LyCORIS and kohya they stand on the outputs, in peft's on the
inputs. At a scale s every R is I + s (R - I), and the sizes of outputs that are learned beside it count in full: so
merges LyCORIS at a multiplier s. (ComfyUI counts s twice, and leaves `rescale` out; peft knows no other scale than 1.)
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.typing import Array

BLOCKS = ("oft_blocks", "oft_R", "boft_R")  # the roles that hold rotations: see jaxdiff/io/lycoris.py
TERMS = 100  # of a series, at most


def rotated(x: Mapping[str, jax.Array], weight: jax.Array, scale: Any) -> jax.Array:
    """What the parts x make of a weight [out, in, …], at a scale.

    Raises:
        TypeError, ValueError: their shapes do not fit the weight's.
    """
    if any(len({*x[role].shape[-2:]}) > 1 for role in BLOCKS if role in x):
        raise ValueError("no square blocks")
    if (blocks := x.get("oft_blocks")) is not None:
        q = _constrained(blocks - blocks.swapaxes(-1, -2), x.get("alpha"), len(weight))
        # OFT's matrices are transposed: those of -Q.
        found = _turned(weight, cayley(q), 1, scale) if q.ndim == 4 else _turned(weight, cayley(-q)[None], 0, scale)
    else:
        free = x.get("boft_R")
        r = x["oft_R"][None] if free is None else cayley((free.swapaxes(-1, -2) - free) / 2)
        columns = weight.reshape(len(weight), -1).T
        found = _turned(columns, r, r.shape[-1] // 2 if len(r) > 1 else 0, scale).T.reshape(weight.shape)
    size = x.get("rescale", x.get("boft_s"))
    return found if size is None else found * size.reshape(len(weight), *(1,) * (weight.ndim - 1))


def cayley(q: jax.Array) -> jax.Array:
    """Equation (1), of skew-symmetric matrices [..., b, b]."""
    eye = jnp.eye(q.shape[-1])
    return jnp.linalg.solve(eye - q, eye + q)


def _constrained(q: jax.Array, alpha: jax.Array | None, outputs: int) -> jax.Array:
    """Q of a norm of at most alpha * outputs, where alpha is positive."""
    if alpha is None:
        return q
    most = alpha.reshape(()) * outputs
    norm = jnp.sqrt(jnp.sum(q**2) + jnp.finfo(q.dtype).tiny) + 1e-8
    return q * jnp.where((most > 0) & (norm > most), most / norm, 1.0)


def _turned(x: jax.Array, stages: jax.Array, step: int, scale: Any) -> jax.Array:
    """Rows x [n, …] by block-diagonal matrices [stages, blocks, b, b], one after the other.

    Args:
        step: before stage i, every other run of b / 2 * 2^i rows is mixed among those between, `step` rows at a time,
            and put back after it; 0 mixes none.
    """
    if not len(stages) or (step and stages.shape[-1] % 2):
        raise ValueError(f"{stages.shape} are no stages")
    eye, shape, rest = jnp.eye(stages.shape[-1]), x.shape, x.shape[1:]
    for i, r in enumerate(stages):
        runs = 2**i * (r.shape[-1] // 2) // step if step else 0
        x = x.reshape(-1, 2, runs, step, *rest).swapaxes(1, 2) if step else x
        x = x.reshape(*r.shape[:2], *rest)
        x = jnp.einsum("nij,nj...->ni...", eye + scale * (r - eye), x, precision="highest")
        x = x.reshape(-1, runs, 2, step, *rest).swapaxes(1, 2) if step else x
        x = x.reshape(shape)
    return x


def unpacked(shape: tuple[int, ...], inputs: int) -> tuple[int, int, int]:
    """The shape [blocks, b, b] of the rotations that peft's `oft_R` is for, [blocks or 1, b (b - 1) / 2].

    Raises:
        ValueError: it is for none of a layer with so many inputs.
    """
    rows, numbers = shape
    b = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if b * (b - 1) // 2 != numbers or inputs % b or rows not in (1, inputs // b):
        raise ValueError(f"{shape} does not fit {inputs} inputs")
    return inputs // b, b, b


def of_peft(x: np.ndarray, config: Mapping[str, Any], inputs: int) -> Array:
    """The rotations [blocks, b, b] of peft's `oft_R`, which has what is above the diagonal of each Q.

    Args:
        config: peft's settings: whether the blocks are one (`block_share`), how long Q may be (`coft`, `eps`), and
            whether R is a series in place of equation (1), whose last term peft halved with version 0.18.

    Raises:
        TypeError, ValueError: the settings are damaged, or do not belong to x.
    """
    blocks, b, _ = unpacked(x.shape, inputs)
    if len(x) != (1 if config.get("block_share") else blocks):
        raise ValueError(f"block_share {config.get('block_share')} for {len(x)} of {blocks} blocks")
    q = np.zeros((len(x), b, b), np.float32)
    q[:, *np.triu_indices(b, 1)] = x
    q -= q.swapaxes(1, 2)
    if config.get("coft"):
        most = float(config.get("eps", 6e-5)) / math.sqrt(len(q))
        if not math.isfinite(most):
            raise ValueError(f"eps {config['eps']}")
        norm = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        q *= np.minimum(1, most / np.maximum(norm, np.finfo(q.dtype).tiny)).astype(q.dtype)
    r = _series(q, config) if config.get("use_cayley_neumann", True) else cayley(jnp.asarray(-q))
    return jnp.broadcast_to(jnp.asarray(r, jnp.float32), (blocks, b, b))


def _series(q: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """I + 2 Q + 2 Q^2 + …, which equation (1) is in the limit."""
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or not 1 <= terms <= TERMS:
        raise ValueError(f"num_cayley_neumann_terms {terms}")
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    halved = terms > 2 and version is not None and (int(version[1]), int(version[2])) >= (0, 18)
    last = max(terms - 1, 3) if halved else terms - 1
    r = power = np.broadcast_to(np.eye(q.shape[-1], dtype=q.dtype), q.shape)
    for n in range(1, last + 1):
        power = power @ q
        r = r + (1 if halved and n == last else 2) * power
    return r
