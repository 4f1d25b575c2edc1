"""Devices: meshes, shardings, and the rule that shards parameters.

Training arranges its devices as a mesh ("data", "fsdp", "tensor"). One rule, `param_spec`, decides from a parameter's
path and shape how it is sharded; its gradient, moments and average follow it:

- over "tensor", paired layers are sharded by columns, then by rows (Shoeybi et al. 2019, section 3), so that the
  activations between the two stay sharded and each pair needs one all-reduce forward and one backward;
- over "fsdp", matrices and kernels are sharded along their largest remaining axis, and gathered for the step that uses
  them (Zhao et al. 2023; Rajbhandari et al. 2020, section 5.3). Vectors are replicated: they are too small to be worth
  a message.

Examples are sharded over both "data" and "fsdp". Sampling maps one program over devices (mapping.py), each of which
has a full copy of the parameters (`replicate`) or a shard of them by the same rule (`shard`).
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

AXES = ("data", "fsdp", "tensor")
AXIS_TYPES = (AxisType.Auto,) * len(AXES)  # the compiler shards activations; JAX versions differ in the default
EXAMPLES = ("data", "fsdp")  # the axes that a batch is sharded over
# The autoencoder's attention is not among them: it has a single head.
COLUMNS = re.compile(
    r"(att(n\d*|ention)/(to_[qkv]|add_[qkv]_proj)|ff(_context)?/net_0_proj|feed_forward/w[13]|self_attn_[qkv]_proj|"
    r"SelfAttention/[qkv]|wi_[01]|mlp_(fc1|gate_proj|up_proj)|resnets_\d+/(conv1|time_emb_proj|norm2))/\w+$"
)
ROWS = re.compile(
    r"(att(n\d*|ention)/(to_out_0|to_add_out)|ff(_context)?/net_2|feed_forward/w2|self_attn_(out|o)_proj|"
    r"SelfAttention/o|DenseReluDense/wo|mlp_(fc2|down_proj)|resnets_\d+/conv2)/kernel$"
)


def mesh(fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts as a mesh over ("data", "fsdp", "tensor"); "data" gets the remaining devices.

    Neighbours in the mesh are neighbours in a TPU's network, and only "data" spans slices.

    Args:
        fsdp: number of devices that each parameter is sharded over; 1 replicates it.
        tensor: number of devices that the layers themselves are sharded over.
        devices: devices of the mesh; None takes all.

    Raises:
        ValueError: `fsdp` times `tensor` does not divide the number of devices, or "tensor" would span hosts.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or tensor < 1 or len(devices) % (fsdp * tensor):
        product = f"fsdp {fsdp}" + (f" x tensor {tensor}" if tensor != 1 else "")
        raise ValueError(f"{product} must divide the number of devices, {len(devices)}.")
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    grid = _device_grid(shape, devices)
    for row in grid.reshape(-1, tensor):
        if len({d.process_index for d in row}) > 1:  # each host reads its own examples
            raise ValueError(f"tensor {tensor} must divide the devices of one host.")
    return Mesh(grid, AXES, axis_types=AXIS_TYPES)


def _device_grid(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh; on TPUs, arranged by their network."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices > 1 and shape[0] % slices == 0:
        slice_shape = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(slice_shape, (slices, 1, 1), devices)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh, axis: int = 0) -> NamedSharding:
    """The sharding of examples along `axis` over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, EXAMPLES))


def param_spec(path: str, shape: Sequence[int], fsdp: int = 1, tensor: int = 1) -> PartitionSpec:
    """The sharding of one parameter, by the rule at the top of this module.

    Args:
        path: its keys joined by "/". Only the end matters, so that the rule also covers moments and averages.
        shape: its shape.
        fsdp, tensor: sizes of these axes of the mesh.

    >>> tuple(param_spec("conv_in/kernel", (3, 3, 64, 128), fsdp=4))
    (None, None, None, 'fsdp')
    >>> tuple(param_spec("attn1/to_q/kernel", (320, 320), fsdp=4, tensor=2))
    ('fsdp', 'tensor')
    >>> tuple(param_spec("ff/net_2/kernel", (1280, 320), fsdp=4, tensor=2))
    ('tensor', 'fsdp')
    >>> tuple(param_spec("conv_in/bias", (64,), fsdp=4)), tuple(param_spec("mlp_fc1/bias", (64,), tensor=2))
    ((), ('tensor',))
    """
    axes: list[str | None] = [None] * len(shape)
    if tensor > 1 and shape:
        is_vector = len(shape) == 1
        axis = -1 if COLUMNS.search(path) else -2 if ROWS.search(path) and not is_vector else None
        if axis is not None and shape[axis] % tensor == 0:
            axes[axis] = "tensor"
    candidates = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0 and size >= fsdp]
    if fsdp > 1 and len(shape) > 1 and candidates:
        axes[max(candidates, key=lambda i: shape[i])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def path_name(path: tuple) -> str:
    """The path of an array in a tree, such as "unet/conv_in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_sharding(mesh: Mesh | AbstractMesh, tree: Any, *, gathered: bool = False) -> Any:
    """A sharding for each array (or shape) of a tree of parameters, optimizer moments or averages.

    Args:
        gathered: shard over "tensor" only, as a training step computes.
    """
    fsdp = 1 if gathered else mesh.shape["fsdp"]

    def leaf_sharding(path: tuple, x: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), x.shape, fsdp, mesh.shape["tensor"]))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def tracing(mesh: Mesh) -> contextlib.AbstractContextManager:
    """A context for tracing in which networks know whether their inputs are sharded."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh.size > 1 else contextlib.nullcontext()


def gather(mesh: Mesh, params: Any, dtype: Any = None) -> Any:
    """Under `jit`: parameters gathered over "fsdp" to compute with; gradients keep the parameters' sharding.

    Args:
        dtype: the compute dtype of matrices, kernels and tables; None keeps theirs. With "fsdp" they are cast before
            they are gathered if that makes them smaller, which saves bandwidth and memory. Gradients have the dtype of
            the parameters.
    """
    types = jax.tree.map(lambda x: x.dtype, params)

    def narrow(x: Any) -> Any:
        wider = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > dtype.itemsize
        return x.astype(dtype) if wider and x.ndim > 1 and mesh.shape["fsdp"] > 1 else x

    @jax.custom_vjp
    def gather_params(params: Any) -> Any:
        sharded = jax.lax.with_sharding_constraint(jax.tree.map(narrow, params), param_sharding(mesh, params))
        return jax.lax.with_sharding_constraint(sharded, param_sharding(mesh, params, gathered=True))

    def backward(_: None, grads: Any) -> tuple[Any]:
        grads = jax.tree.map(lambda grad, source_dtype: grad.astype(source_dtype), grads, types)
        return (jax.lax.with_sharding_constraint(grads, param_sharding(mesh, grads)),)

    gather_params.defvjp(lambda params: (gather_params(params), None), backward)
    return gather_params(params)


class ShardedGroup(NamedTuple):
    """Parameters of one kind and their sharding, a row of `sharding_table`."""

    name: str  # the module and the end of the path, numbers as *
    spec: PartitionSpec
    arrays: int
    size: int  # bytes in all
    per_device: int  # bytes


def sharded_groups(mesh: Mesh | AbstractMesh, params: Any) -> list[ShardedGroup]:
    """The shardings of parameters (or their shapes), one row for each kind, the largest first."""
    rows: dict[tuple[str, PartitionSpec], list[int]] = {}
    shardings = jax.tree.leaves(param_sharding(mesh, params))
    for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(params), shardings, strict=True):
        keys = re.sub(r"_\d+", "_*", path_name(path)).split("/")
        row = rows.setdefault(("/".join([keys[0], *keys[max(1, len(keys) - 3) :]]), sharding.spec), [0, 0, 0])
        itemsize = np.dtype(x.dtype).itemsize
        per_device = int(np.prod(sharding.shard_shape(x.shape), dtype=np.int64)) * itemsize
        for i, value in enumerate((1, int(np.prod(x.shape, dtype=np.int64)) * itemsize, per_device)):
            row[i] += value
    groups = [ShardedGroup(name, spec, *values) for (name, spec), values in rows.items()]
    return sorted(groups, key=lambda group: -group.size)


def sharding_table(mesh: Mesh | AbstractMesh, params: Any) -> str:
    """`sharded_groups` as a table of text: name, number of arrays, megabytes in total and per device, sharding."""
    rows = sharded_groups(mesh, params)
    arrays, size, per_device = (sum(getattr(row, name) for row in rows) for name in ("arrays", "size", "per_device"))
    rows = [*rows, ShardedGroup("all", PartitionSpec(), arrays, size, per_device)]
    width = max(len(row.name) for row in rows)
    lines = [f"{'parameters':{width}}  arrays       MB  MB/device  divided over"]
    for row in rows:
        spec = ", ".join(str(axis or "-") for axis in row.spec)
        line = f"{row.name:{width}}  {row.arrays:6}  {row.size / 1e6:7.1f}  {row.per_device / 1e6:9.2f}  {spec}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def put_global(tree: Any, sharding: Any) -> Any:
    """Put arrays that every host holds in full onto the devices; `sharding` is one sharding or a tree of them.

    Each host fills its own devices. `jax.device_put` would first gather every host's copy on every device, to check
    that they are equal.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x: Any, sharding: Sharding) -> jax.Array:
        if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, Sharding) else sharding
    return jax.tree.map(put, tree, shardings)


def fetch(tree: Any) -> Any:
    """Sharded arrays as full numpy arrays. Collective: every host that holds a shard must call it."""

    def gather_leaf(x: Any) -> Any:
        is_distributed = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if is_distributed else x

    return jax.device_get(jax.tree.map(gather_leaf, tree))


def global_batch(mesh: Mesh, batch: Any) -> Any:
    """Local examples [b, ...] of each host as global arrays [b * hosts, ...], sharded over "data" and "fsdp"."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def global_row_order(mesh: Mesh, batch_size: int) -> np.ndarray:
    """For each row of `global_batch` [B], its index in the concatenation of the hosts' batches."""
    owner = np.empty(batch_size, int)
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((batch_size,))
    for device, (index,) in places.items():
        owner[index] = device.process_index
    return _row_order(owner)


def _row_order(owner: np.ndarray) -> np.ndarray:
    """`global_row_order`, from the host that owns each row.

    This is the identity unless the mesh, which follows the network, interleaves hosts.

    >>> _row_order(np.asarray([0, 1, 0, 1])).tolist()
    [0, 2, 1, 3]
    """
    order = np.empty(len(owner), int)
    order[np.argsort(owner, kind="stable")] = np.arange(len(owner))
    return order


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices over one axis "data". Nothing is sent along it, so their order does not matter."""
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def device_memory() -> float:
    """Bytes of memory of one local device, or of the machine if that is a CPU; inf if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    return host_memory()


def host_memory() -> float:
    """Bytes of memory of this machine; inf if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not supported on this system
        return float("inf")


def replicate(params: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """A full copy of the parameters on each device, so that `generate` runs there without copying at each call.

    Args:
        params: a tree of arrays.
        devices: None takes all that this process has.
    """
    return put_global(params, replicated(data_mesh(jax.local_devices() if devices is None else devices)))


def shard(params: Any, mesh: Mesh) -> Any:
    """The parameters sharded over a `mesh`, so that `generate` runs there and no device holds the whole model."""
    return put_global(params, param_sharding(mesh, params))


def place(x: np.ndarray, path: str, mesh: Mesh | None) -> jax.Array:
    """One parameter on the default device, or sharded over a mesh as by `shard`. Compiles nothing."""
    return jax.device_put(x) if mesh is None else shard({path: x}, mesh)[path]


def committed(tree: Any) -> tuple[jax.Device, ...] | Mesh:
    """The mesh over which a tree's arrays are sharded, else the devices they are committed to, else no devices."""
    for x in jax.tree.leaves(tree):
        if getattr(x, "committed", False):
            mesh = getattr(x.sharding, "mesh", None)
            if isinstance(mesh, Mesh) and mesh.axis_names == AXES and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
                return mesh
            return tuple(x.sharding.devices_indices_map(x.shape))
    return ()
