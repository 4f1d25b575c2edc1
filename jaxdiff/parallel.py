"""Devices: meshes, shardings, and the rule by which parameters are sharded.

Training arranges its devices as a mesh ("data", "fsdp", "tensor"). One rule, `param_spec`, decides from a parameter's
path and shape how it is sharded, together with its gradient, optimizer moments and moving average:

- over "tensor", layers that come in pairs are split by columns, then by rows (Shoeybi et al. 2019, section 3), so that
  activations between the two stay sharded and each pair needs one all-reduce forward and one backward;
- over "fsdp", matrices and kernels are split along their largest remaining axis, and gathered for the step that uses
  them (Zhao et al. 2023; Rajbhandari et al. 2020, section 5.3). Vectors stay whole: they are too small to be worth a
  message.

Examples are divided over "data" and "fsdp" alike. Sampling maps one program over devices (mapping.py), each of which
has a whole copy of the parameters (`replicate`) or keeps them sharded by the same rule (`shard`).
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
AXIS_TYPES = (AxisType.Auto,) * len(
    AXES
)  # the compiler shards intermediates; the default differs between versions of JAX
EXAMPLES = ("data", "fsdp")  # the axes that a batch is divided over
# The autoencoder's attention is not among them: it has a single head, which cannot be split.
COLUMNS = re.compile(
    r"(att(n\d*|ention)/(to_[qkv]|add_[qkv]_proj)|ff(_context)?/net_0_proj|feed_forward/w[13]|self_attn_[qkv]_proj|"
    r"SelfAttention/[qkv]|wi_[01]|mlp_(fc1|gate_proj|up_proj)|resnets_\d+/(conv1|time_emb_proj|norm2))/\w+$"
)
ROWS = re.compile(
    r"(att(n\d*|ention)/(to_out_0|to_add_out)|ff(_context)?/net_2|feed_forward/w2|self_attn_(out|o)_proj|"
    r"SelfAttention/o|DenseReluDense/wo|mlp_(fc2|down_proj)|resnets_\d+/conv2)/kernel$"
)


def mesh(fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts as a mesh ("data", "fsdp", "tensor"), where "data" gets the remaining factor.

    Neighbours in the mesh are neighbours in a TPU's network, and only "data" spans several slices.

    Args:
        fsdp: number of devices over which each parameter is sharded; 1 keeps a whole copy on each.
        tensor: number of devices over which the layers themselves are split.
        devices: of the mesh; None: all devices of all processes.

    Raises:
        ValueError: `fsdp` times `tensor` does not divide the number of devices, or "tensor" would span hosts.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or tensor < 1 or len(devices) % (fsdp * tensor):
        product = f"fsdp {fsdp}" + (f" x tensor {tensor}" if tensor != 1 else "")
        raise ValueError(f"{product} must divide the number of devices, {len(devices)}.")
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    laid_out = _lay_out(shape, devices)
    for row in laid_out.reshape(-1, tensor):
        if (
            len({d.process_index for d in row}) > 1
        ):  # each host reads its own examples, so they would differ within a row
            raise ValueError(f"tensor {tensor} must divide the devices of one host.")
    return Mesh(laid_out, AXES, axis_types=AXIS_TYPES)


def _lay_out(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices > 1 and shape[0] % slices == 0:
        within = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh, axis: int = 0) -> NamedSharding:
    """Examples along `axis` divided over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, EXAMPLES))


def param_spec(path: str, shape: Sequence[int], fsdp: int = 1, tensor: int = 1) -> PartitionSpec:
    """How one parameter is sharded: the rule at the top of this module.

    Args:
        path: its keys joined by "/"; only the end matters, so that the rule also applies to moments and averages.
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
        vector = len(shape) == 1
        place = -1 if COLUMNS.search(path) else -2 if ROWS.search(path) and not vector else None
        if place is not None and shape[place] % tensor == 0:
            axes[place] = "tensor"
    left = [i for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0 and size >= fsdp]
    if fsdp > 1 and len(shape) > 1 and left:
        axes[max(left, key=lambda i: shape[i])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def path_name(path: tuple) -> str:
    """The path of an array in a tree, such as "unet/conv_in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_sharding(mesh: Mesh | AbstractMesh, tree: Any, *, gathered: bool = False) -> Any:
    """A sharding for each array (or shape) in a tree of parameters, optimizer moments or averages.

    Args:
        gathered: whether for use in a step: sharded over "tensor" only.
    """
    fsdp = 1 if gathered else mesh.shape["fsdp"]

    def one(path: tuple, x: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), x.shape, fsdp, mesh.shape["tensor"]))

    return jax.tree_util.tree_map_with_path(one, tree)


def tracing(mesh: Mesh) -> contextlib.AbstractContextManager:
    """A context for tracing a program: tells the networks the mesh over which their inputs are sharded."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh.size > 1 else contextlib.nullcontext()


def gather(mesh: Mesh, params: Any, dtype: Any = None) -> Any:
    """Inside a program: parameters gathered for a step; their gradients are sharded like the parameters.

    Args:
        dtype: to which the networks cast matrices, kernels and tables before use; None: they do not. Under "fsdp" these
            are cast before they are gathered, if that makes them smaller, to send and hold less. Gradients keep the
            parameters' dtype.
    """
    types = jax.tree.map(lambda x: x.dtype, params)

    def narrowed(x: Any) -> Any:
        wider = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > dtype.itemsize
        return x.astype(dtype) if wider and x.ndim > 1 and mesh.shape["fsdp"] > 1 else x

    @jax.custom_vjp
    def gathered(params: Any) -> Any:
        divided = jax.lax.with_sharding_constraint(jax.tree.map(narrowed, params), param_sharding(mesh, params))
        return jax.lax.with_sharding_constraint(divided, param_sharding(mesh, params, gathered=True))

    def backward(_: None, grads: Any) -> tuple[Any]:
        grads = jax.tree.map(lambda grad, kind: grad.astype(kind), grads, types)
        return (jax.lax.with_sharding_constraint(grads, param_sharding(mesh, grads)),)

    gathered.defvjp(lambda params: (gathered(params), None), backward)
    return gathered(params)


class ShardedGroup(NamedTuple):
    """Parameters of one kind and their sharding, a row of `sharding_table`."""

    name: str  # the module and the end of the path, numbers as *
    spec: PartitionSpec
    arrays: int
    size: int  # bytes in all
    each: int  # bytes a device


def sharded_groups(mesh: Mesh | AbstractMesh, params: Any) -> list[ShardedGroup]:
    """The sharding of parameters (or their shapes), one row for those of one kind; the largest first."""
    rows: dict[tuple[str, PartitionSpec], list[int]] = {}
    shardings = jax.tree.leaves(param_sharding(mesh, params))
    for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(params), shardings, strict=True):
        keys = re.sub(r"_\d+", "_*", path_name(path)).split("/")
        row = rows.setdefault(("/".join([keys[0], *keys[max(1, len(keys) - 3) :]]), sharding.spec), [0, 0, 0])
        width = np.dtype(x.dtype).itemsize
        each = int(np.prod(sharding.shard_shape(x.shape), dtype=np.int64)) * width
        for i, value in enumerate((1, int(np.prod(x.shape, dtype=np.int64)) * width, each)):
            row[i] += value
    found = [ShardedGroup(name, spec, *values) for (name, spec), values in rows.items()]
    return sorted(found, key=lambda part: -part.size)


def sharding_table(mesh: Mesh | AbstractMesh, params: Any) -> str:
    """`sharded_groups` as a text table: names, numbers of arrays, megabytes in all and per device, axes."""
    rows = sharded_groups(mesh, params)
    arrays, size, each = (sum(getattr(row, name) for row in rows) for name in ("arrays", "size", "each"))
    rows = [*rows, ShardedGroup("all", PartitionSpec(), arrays, size, each)]
    width = max(len(row.name) for row in rows)
    lines = [f"{'parameters':{width}}  arrays       MB  MB/device  divided over"]
    for row in rows:
        spec = ", ".join(str(axis or "-") for axis in row.spec)
        line = f"{row.name:{width}}  {row.arrays:6}  {row.size / 1e6:7.1f}  {row.each / 1e6:9.2f}  {spec}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def put_global(tree: Any, sharding: Any) -> Any:
    """Put arrays that every host holds in full onto the devices.

    Each host fills its own devices. (`jax.device_put` would first gather every host's copy of an array on every device,
    to check that they are equal.)

    Args:
        sharding: one for all arrays, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any, sharding: Sharding) -> jax.Array:
        if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, Sharding) else sharding
    return jax.tree.map(one, tree, shardings)


def fetch(tree: Any) -> Any:
    """Sharded arrays in full as numpy arrays, on every host that holds a part of them."""

    def whole(x: Any) -> Any:
        spans = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if spans else x

    return jax.device_get(jax.tree.map(whole, tree))


def global_batch(mesh: Mesh, batch: Any) -> Any:
    """The examples [b, ...] that each host has read, as global arrays [b * hosts, ...] over "data" and "fsdp"."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def global_row_order(mesh: Mesh, batch_size: int) -> np.ndarray:
    """For each row of `global_batch` its row in the hosts' batches concatenated in order, int [B]."""
    owner = np.empty(batch_size, int)
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((batch_size,))
    for device, (index,) in places.items():
        owner[index] = device.process_index
    return _row_order(owner)


def _row_order(owner: np.ndarray) -> np.ndarray:
    """`global_row_order`, from the host that owns each row.

    It is the identity unless a mesh that follows a TPU's network interleaves hosts.

    >>> _row_order(np.asarray([0, 1, 0, 1])).tolist()
    [0, 2, 1, 3]
    """
    found = np.empty(len(owner), int)
    found[np.argsort(owner, kind="stable")] = np.arange(len(owner))
    return found


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the devices in the order given, with one axis "data"; nothing is sent along it, so any order does."""
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def device_memory() -> float:
    """Bytes of memory of one of this process's devices, or of the machine where it is the CPU; inf if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", float("inf"))
    return host_memory()


def host_memory() -> float:
    """Bytes of memory of this machine; inf if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return float("inf")


def replicate(params: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Put a whole copy of the parameters on each device: `generate` then draws there, and copies nothing at each call.

    Args:
        params: a tree of arrays.
        devices: None: all devices of this process.
    """
    return put_global(params, replicated(data_mesh(jax.local_devices() if devices is None else devices)))


def shard(params: Any, mesh: Mesh) -> Any:
    """Shard the parameters over a `mesh`: `generate` then draws there, and no device holds the whole model.

    Args:
        params: a tree of arrays.
        mesh: as `jaxdiff.parallel.mesh` makes it.
    """
    return put_global(params, param_sharding(mesh, params))


def place(x: np.ndarray, path: str, mesh: Mesh | None) -> jax.Array:
    """Put one parameter on the default device, or shard it over a mesh as `shard` does. Compiles nothing."""
    return jax.device_put(x) if mesh is None else shard({path: x}, mesh)[path]


def committed(tree: Any) -> tuple[jax.Device, ...] | Mesh:
    """The mesh over which a tree is sharded, else the devices that it was put on; () if jax may choose."""
    for x in jax.tree.leaves(tree):
        if getattr(x, "committed", False):
            mesh = getattr(x.sharding, "mesh", None)
            if isinstance(mesh, Mesh) and mesh.axis_names == AXES and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
                return mesh
            return tuple(x.sharding.devices_indices_map(x.shape))
    return ()
