"""Mapping one program over devices, for sampling and for encoding data; only sharded parameters are communicated."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.parallel import EXAMPLES, data_mesh, param_sharding, put_global, replicated


class Mapped(NamedTuple):
    """The result of `pmap`, a callable; `lookup(program, *args)` may return a program compiled earlier."""

    run: Callable
    program: Any  # the jitted function of batches that divide evenly; `lower` it to see what is compiled

    def __call__(self, *args: Any, lookup: Callable[..., Callable] | None = None) -> Any:
        return self.run(*args, lookup=lookup)


def on_cpus(devices: Sequence[jax.Device] | Mesh) -> bool:
    """Whether the devices are CPUs, with replicated parameters."""
    return not isinstance(devices, Mesh) and devices[0].platform == "cpu"


@dataclasses.dataclass(frozen=True)
class Divided:
    """Sharded parameters inside a `pmap` program: `divided[name]` gathers those of one network over "fsdp"."""

    parts: Any  # the shards of each device
    shardings: Any

    def __getitem__(self, name: str) -> Any:
        def gather_leaf(x: Any, sharding: NamedSharding) -> Any:
            axes = list(sharding.spec)
            return jax.lax.all_gather(x, "fsdp", axis=axes.index("fsdp"), tiled=True) if "fsdp" in axes else x

        def gather(parts: Any) -> Any:
            return jax.tree.map(gather_leaf, parts, self.shardings[name])

        auto = set(jax.sharding.get_abstract_mesh().auto_axes)
        if auto:  # without a nested shard_map the compiler would first gather over "tensor" as well
            specs = jax.tree.map(lambda x: drop_axis(x.spec, "fsdp"), self.shardings[name])
            gather = jax.shard_map(gather, in_specs=(specs,), out_specs=specs, axis_names=auto, check_vma=False)
        return gather(self.parts[name])


def drop_axis(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """The spec without one axis of the mesh."""
    return PartitionSpec(*[None if name == axis else name for name in spec])


def anew(params: Any, x: Any) -> tuple[Any, Any]:
    """The same parameters and x behind an optimization barrier, so that parameters are gathered again for each x."""
    if not isinstance(params, Divided):
        return params, x
    parts, x = jax.lax.optimization_barrier((params.parts, x))
    return Divided(parts, params.shardings), x


def part_count(devices: Sequence[jax.Device] | Mesh) -> int:
    """The number of parts into which `pmap` divides a batch."""
    mesh = devices if isinstance(devices, Mesh) else data_mesh(devices)
    return math.prod(mesh.shape[axis] for axis in EXAMPLES if axis in mesh.axis_names)


def filled_rows(tree: Any, batch: int, parts: int) -> Any:
    """Arrays [batch, ...] padded with their last row to a multiple of `parts` rows."""
    missing = -batch % parts
    rows = np.minimum(np.arange(batch + missing), batch - 1)
    return jax.tree.map(lambda x: x[rows], tree) if missing else tree


def pmap(function: Callable, devices: Sequence[jax.Device] | Mesh, shared: int = 0) -> Mapped:
    """Map a function over devices, each with its part of a batch, as `jax.pmap` did; see docs/adr/001-devices.md.

    Args:
        function: takes `shared` arguments that every device gets whole, then arguments [B, ...] that are divided along
            their first axis (trees of arrays; None if absent), and returns a tree of arrays [B, ...].
        devices: to map over; or a `mesh`, over which the first shared argument, the parameters, is sharded as by
            `shard`: the function gets it as `Divided`, and batches are divided over "data" and "fsdp".
        shared: number of leading arguments that are not divided.

    Returns:
        A function of the same arguments for any B >= 1. A batch that does not divide evenly is padded with its last
        row, and the results are cut. If `function` treats its rows independently, the compiled program communicates
        nothing but sharded parameters.
    """
    mesh, divided = (devices, True) if isinstance(devices, Mesh) else (data_mesh(devices), False)
    axes = tuple(axis for axis in EXAMPLES if axis in mesh.axis_names)
    rows, parts = PartitionSpec(axes), part_count(mesh)
    manual = set(axes) if mesh.shape.get("tensor", 1) > 1 else set(mesh.axis_names)  # "tensor" is the compiler's

    def shardings(args: Sequence[Any]) -> list[Any]:
        placements: list[Any] = [replicated(mesh)] * shared + [NamedSharding(mesh, rows)] * (len(args) - shared)
        return [param_sharding(mesh, args[0]), *placements[1:]] if divided else placements

    @jax.jit
    def program(*args):
        run, placements = function, shardings(args)
        if divided:
            run = lambda params, *inputs: function(Divided(params, placements[0]), *inputs)  # noqa: E731
            args = (jax.lax.with_sharding_constraint(args[0], placements[0]), *args[1:])
        specs = tuple(jax.tree.map(lambda x: drop_axis(x.spec, "tensor"), placements))
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, axis_names=manual, check_vma=False)(*args)

    def run_padded(*args, lookup):
        batched = args[shared:]
        batch = jax.tree.leaves(batched)[0].shape[0]
        args = (*args[:shared], *filled_rows(batched, batch, parts))
        if mesh.is_multi_process:
            args = tuple(map(put_global, args, shardings(args)))
        outputs = (program if lookup is None else lookup(program, *args))(*args)
        return jax.tree.map(lambda x: x[:batch], outputs) if batch % parts else outputs

    return Mapped(run_padded, program)
