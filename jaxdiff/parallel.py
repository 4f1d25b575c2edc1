"""Devices: meshes and shardings. No other module knows how many there are."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts as a mesh over ("data", "fsdp") for training.

    Args:
        fsdp: over how many devices each parameter is split (Zhao et al. 2023); 1 keeps a whole copy on each.
        devices: what the mesh is made of; None takes all.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp {fsdp} must divide the number of devices, {len(devices)}.")
    return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Examples along `axis` divided over every device."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXES))


def param_spec(shape: Sequence[int], fsdp: int) -> PartitionSpec:
    """How one parameter is split: along its largest axis that `fsdp` divides, else not at all.

    >>> tuple(param_spec((3, 3, 64, 128), fsdp=4))
    (None, None, None, 'fsdp')
    >>> tuple(param_spec((6, 64), fsdp=4)), tuple(param_spec((6,), fsdp=4)), tuple(param_spec((128,), fsdp=1))
    ((None, 'fsdp'), (), ())
    """
    divisible = [i for i, size in enumerate(shape) if size >= fsdp and size % fsdp == 0]
    if fsdp == 1 or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*[None] * largest, "fsdp")


def param_sharding(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each array (or shape) of a tree: whole along "data", split along "fsdp" by `param_spec`.

    It looks at shapes only, so an optimizer's moments and an average are split as the parameters they belong to.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, param_spec(x.shape, mesh.shape["fsdp"])), tree)


def place(tree: Any, sharding: Any) -> Any:
    """Put arrays that every host holds in full onto the devices; `sharding` is one for all or a tree of them."""
    return jax.device_put(tree, sharding)


def global_batch(mesh: Mesh, batch: Any) -> Any:
    """The examples that each host has read [b, ...], as global arrays [b * hosts, ...] divided over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


class Mapped(NamedTuple):
    """What `pmap` returns: call it as a function."""

    run: Callable
    program: Any  # the jitted program of batches that divide evenly; `lower` on it shows what is compiled

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


def pmap(function: Callable, devices: Sequence[jax.Device], shared: int = 0) -> Mapped:
    """Map one program over devices, each with its part of a batch, as `jax.pmap` did; see docs/adr/001-devices.md.

    Args:
        function: of `shared` arguments that every device gets whole, then of arguments [B, ...] that are divided along
            their first axis (trees of arrays; None where absent). Returns a tree of arrays [B, ...].
        devices: what to map over.
        shared: how many leading arguments are not divided.

    Returns:
        A function of the same arguments for any B >= 1. A batch that does not divide evenly is filled up with its
        last row, and the results of the filling are cut off. The compiled program of a function that treats its rows
        independently holds no communication.
    """
    line = Mesh(np.asarray(devices), ("data",))
    whole, divided = PartitionSpec(), PartitionSpec("data")

    @jax.jit
    def program(*args):
        specs = (whole,) * shared + (divided,) * (len(args) - shared)
        return jax.shard_map(function, mesh=line, in_specs=specs, out_specs=divided, check_vma=False)(*args)

    def mapped(*args):
        each = args[shared:]
        batch = jax.tree.leaves(each)[0].shape[0]
        missing = -batch % len(devices)
        if missing:
            each = jax.tree.map(lambda x: x[np.minimum(np.arange(batch + missing), batch - 1)], each)
        out = program(*args[:shared], *each)
        return jax.tree.map(lambda x: x[:batch], out) if missing else out

    return Mapped(mapped, program)
