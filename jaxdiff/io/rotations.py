"""Adapters that rotate a weight (OFT, Qiu et al. 2023, arXiv:2306.07280; BOFT, Liu et al. 2024, arXiv:2311.06243).

The rotation of a block is the Cayley transform of a skew-symmetric Q,

    R = (I + Q) (I - Q)^-1                                                                               (1)

OFT multiplies by one block-diagonal matrix of such R. BOFT multiplies by several, and permutes the rows before each, so
that blocks ever further apart are mixed. LyCORIS and kohya rotate the outputs, peft the inputs. At a scale s every R
becomes I + s (R - I), while the learned sizes of the outputs apply in full, as LyCORIS merges at a multiplier s.
(ComfyUI applies s twice and omits `rescale`; peft only has scale 1.)
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.typing import Array

BLOCKS = ("oft_blocks", "oft_R", "boft_R")  # roles of rotations: see jaxdiff/io/lycoris.py
TERMS = 100  # maximum for a series


def rotate(x: Mapping[str, jax.Array], weight: jax.Array, scale: Any) -> jax.Array:
    """A weight [out, in, …] rotated by the parts x at a scale.

    Raises:
        TypeError, ValueError: their shapes do not fit the weight's.
    """
    if any(len({*x[role].shape[-2:]}) > 1 for role in BLOCKS if role in x):
        raise ValueError("no square blocks")
    if (blocks := x.get("oft_blocks")) is not None:
        q = _constrained(blocks - blocks.swapaxes(-1, -2), x.get("alpha"), len(weight))
        # OFT uses the transposed matrices, which are those of -Q.
        stages, step = (cayley(q), 1) if q.ndim == 4 else (cayley(-q)[None], 0)
        rotated = _apply_stages(weight, stages, step, scale)
    else:
        parameters = x.get("boft_R")
        r = x["oft_R"][None] if parameters is None else cayley((parameters.swapaxes(-1, -2) - parameters) / 2)
        columns = weight.reshape(len(weight), -1).T
        rotated = _apply_stages(columns, r, r.shape[-1] // 2 if len(r) > 1 else 0, scale).T.reshape(weight.shape)
    rescale = x.get("rescale", x.get("boft_s"))
    return rotated if rescale is None else rotated * rescale.reshape(len(weight), *(1,) * (weight.ndim - 1))


def cayley(q: jax.Array) -> jax.Array:
    """Equation (1), of skew-symmetric matrices [..., b, b]."""
    eye = jnp.eye(q.shape[-1])
    return jnp.linalg.solve(eye - q, eye + q)


def _constrained(q: jax.Array, alpha: jax.Array | None, outputs: int) -> jax.Array:
    """Q scaled down to a norm of at most alpha * outputs, if alpha is positive."""
    if alpha is None:
        return q
    limit = alpha.reshape(()) * outputs
    norm = jnp.sqrt(jnp.sum(q**2) + jnp.finfo(q.dtype).tiny) + 1e-8
    return q * jnp.where((limit > 0) & (norm > limit), limit / norm, 1.0)


def _apply_stages(x: jax.Array, stages: jax.Array, step: int, scale: Any) -> jax.Array:
    """Multiply rows x [n, …] by block-diagonal matrices [stages, blocks, b, b] in turn.

    Args:
        step: before stage i, pairs of runs of b / 2 * 2^i rows are interleaved, `step` rows at a time; the order is
            restored after the stage. 0 does not interleave.
    """
    if not len(stages) or (step and stages.shape[-1] % 2):
        raise ValueError(f"{stages.shape} are no stages")
    eye, shape, inner = jnp.eye(stages.shape[-1]), x.shape, x.shape[1:]
    for i, r in enumerate(stages):
        runs = 2**i * (r.shape[-1] // 2) // step if step else 0
        x = x.reshape(-1, 2, runs, step, *inner).swapaxes(1, 2) if step else x
        x = x.reshape(*r.shape[:2], *inner)
        x = jnp.einsum("nij,nj...->ni...", eye + scale * (r - eye), x, precision="highest")
        x = x.reshape(-1, runs, 2, step, *inner).swapaxes(1, 2) if step else x
        x = x.reshape(shape)
    return x


def unpacked_shape(shape: tuple[int, ...], inputs: int) -> tuple[int, int, int]:
    """The shape [blocks, b, b] of the rotations in peft's `oft_R`, of shape [blocks or 1, b (b - 1) / 2].

    Raises:
        ValueError: it does not fit a layer with this number of inputs.
    """
    rows, numbers = shape
    b = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if b * (b - 1) // 2 != numbers or inputs % b or rows not in (1, inputs // b):
        raise ValueError(f"{shape} does not fit {inputs} inputs")
    return inputs // b, b, b


def from_peft(x: np.ndarray, config: Mapping[str, Any], inputs: int) -> Array:
    """The rotations [blocks, b, b] of peft's `oft_R`, which holds the upper triangle of each Q.

    Args:
        config: peft's settings: whether blocks are shared (`block_share`), the maximum norm of Q (`coft`, `eps`), and
            whether R is a series instead of equation (1), the last term of which peft halves since version 0.18.

    Raises:
        TypeError, ValueError: the settings are damaged, or do not fit x.
    """
    blocks, b, _ = unpacked_shape(x.shape, inputs)
    if len(x) != (1 if config.get("block_share") else blocks):
        raise ValueError(f"block_share {config.get('block_share')} for {len(x)} of {blocks} blocks")
    q = np.zeros((len(x), b, b), np.float32)
    q[:, *np.triu_indices(b, 1)] = x
    q -= q.swapaxes(1, 2)
    if config.get("coft"):
        limit = float(config.get("eps", 6e-5)) / math.sqrt(len(q))
        if not math.isfinite(limit):
            raise ValueError(f"eps {config['eps']}")
        norm = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        q *= np.minimum(1, limit / np.maximum(norm, np.finfo(q.dtype).tiny)).astype(q.dtype)
    r = _series(q, config) if config.get("use_cayley_neumann", True) else cayley(jnp.asarray(-q))
    return jnp.broadcast_to(jnp.asarray(r, jnp.float32), (blocks, b, b))


def _series(q: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """I + 2 Q + 2 Q^2 + …, whose limit is equation (1)."""
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or not 1 <= terms <= TERMS:
        raise ValueError(f"num_cayley_neumann_terms {terms}")
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    halved = terms > 2 and version is not None and (int(version[1]), int(version[2])) >= (0, 18)
    degree = max(terms - 1, 3) if halved else terms - 1
    r = power = np.broadcast_to(np.eye(q.shape[-1], dtype=q.dtype), q.shape)
    for n in range(1, degree + 1):
        power = power @ q
        r = r + (1 if halved and n == degree else 2) * power
    return r
