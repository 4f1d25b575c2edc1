"""Attention kernels of accelerators, which never store the scores (Dao et al. 2022, "FlashAttention").

On NVIDIA GPUs cuDNN's, by `jax.nn`; on TPUs JAX's own in Pallas (docs/adr/003-fused-attention.md). Both have fused
backward passes. Only `attention` calls them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdiff.typing import Array

FUSED_FROM = 1024  # queries and keys; with fewer the scores are small, and plain products faster
BLOCK = 512  # queries, and keys, that the TPU's kernel has in its fast memory at a time
EXAMPLES = ("data", "fsdp")


def cudnn_takes(q: Array) -> bool:
    """Whether cuDNN is available and its kernel supports queries [B, N, H, d] of this dtype and width."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and has_cudnn()


@functools.cache
def has_cudnn() -> bool:
    """Whether cuDNN is installed and all GPUs are Ampere or newer."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(cudnn_attention, x, x, x, None)
    except (RuntimeError, NotImplementedError):
        return False
    return all(float(getattr(device, "compute_capability", 8)) >= 8 for device in jax.local_devices())


def cudnn_attention(q: Array, k: Array, v: Array, bias: None) -> Array:
    """softmax(q kᵀ / sqrt(d)) v of [B, N, H, d], in bfloat16 or float16."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def tpu_takes(q: Array) -> bool:
    """Whether the TPU's kernel supports queries [B, N, H, d] of this dtype and width, sharded over the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    b, _, h, d = q.shape
    examples, heads = mesh_sizes(mesh)
    fits = q.dtype in (jnp.bfloat16, jnp.float32) and (d <= 128 or d % 128 == 0)
    return fits and b % examples == 0 and h % heads == 0


def mesh_sizes(mesh: jax.sharding.AbstractMesh) -> tuple[int, int]:
    """The numbers of devices over which the compiler shards examples, and heads."""
    sizes = {axis: mesh.shape[axis] for axis in mesh.auto_axes}
    return sizes.get("data", 1) * sizes.get("fsdp", 1), sizes.get("tensor", 1)


def tpu_attention(q: Array, k: Array, v: Array, bias: None) -> Array:
    """softmax(q kᵀ / sqrt(d)) v of [B, N, H, d]; on a mesh each device computes its own examples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return pallas_attention(q, k, v)
    axes = set(mesh.auto_axes)
    examples = tuple(axis for axis in EXAMPLES if axis in axes)
    spec = PartitionSpec(examples, None, "tensor" if "tensor" in axes else None)
    # The compiler cannot partition a custom kernel.
    return jax.shard_map(
        pallas_attention, in_specs=(spec,) * 3, out_specs=spec, axis_names=axes, check_vma=False
    )(q, k, v)  # fmt: skip


def pallas_attention(q: Array, k: Array, v: Array) -> Array:
    """The same on one device: tokens are padded to whole blocks, and no query sees the padding."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, n, _, d = q.shape
    m = k.shape[1]
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % BLOCK), (0, 0))) for x in (q, k, v))
    ids = None
    if k.shape[2] != m:  # queries see keys of the same number
        real = jnp.broadcast_to(jnp.arange(k.shape[2]) < m, (b, k.shape[2])).astype(jnp.int32)
        ids = flash.SegmentIds(jnp.ones((b, q.shape[2]), jnp.int32), real)
    blocks = flash.BlockSizes(
        block_q=BLOCK, block_k_major=BLOCK, block_k=BLOCK, block_b=1,
        block_q_major_dkv=BLOCK, block_k_major_dkv=BLOCK, block_k_dkv=BLOCK, block_q_dkv=BLOCK,
        block_k_major_dq=BLOCK, block_k_dq=BLOCK, block_q_dq=BLOCK,
    )  # fmt: skip
    out = flash.flash_attention(q, k, v, segment_ids=ids, sm_scale=d**-0.5, block_sizes=blocks)
    return out[:, :, :n].swapaxes(1, 2)
