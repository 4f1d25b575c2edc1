"""Memory and communication of a run on each device, computed before anything is allocated."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxdiff import parallel
from jaxdiff.training import collectives
from jaxdiff.training.loop import Stage
from jaxdiff.training.options import Options, OptionsError
from jaxdiff.training.train_step import TrainState, make_train_step
from jaxdiff.typing import Params


class Memory(NamedTuple):
    """Bytes on one device."""

    params: int  # trained parameters
    optimizer: int
    average: int  # of the trained parameters
    frozen: int  # parameters that the loss needs but does not train
    gradients: int  # for a while in each step
    batch: int


class Step(NamedTuple):
    """Costs of the compiled training step."""

    temporary: int  # peak bytes on one device: activations, gradients, gathered parameters
    flops: float  # of one device
    sent: list[collectives.Collective]


def abstract_mesh(devices: int, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """The mesh of `parallel.mesh` over devices that need not exist.

    Raises:
        OptionsError: `fsdp` times `tensor` does not divide `devices`.
    """
    if devices % (fsdp * tensor):
        raise OptionsError(f"fsdp {fsdp} x tensor {tensor} must divide the number of devices, {devices}.")
    return AbstractMesh((devices // (fsdp * tensor), fsdp, tensor), parallel.AXES, axis_types=parallel.AXIS_TYPES)


def abstract_batch(stage: Stage, example: Mapping[str, Any], size: int, mesh: Mesh | AbstractMesh) -> Any:
    """A batch of `size` examples as shapes, from one unprepared example {"image": [1, …], …}."""
    sharding = parallel.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding), dict(stage.prepare(example))
    )


def bytes_each(tree: Any) -> int:
    """Bytes on one device of arrays, or of shapes with shardings."""
    sizes = (np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return int(sum(sizes))


def memory(state: TrainState, frozen: Params, batch: Any) -> Memory:
    """Memory of a state on one device; the trees hold arrays, or shapes with shardings."""
    params = bytes_each(state.params)
    return Memory(
        params, bytes_each(state.opt_state), bytes_each(state.ema), bytes_each(frozen), params, bytes_each(batch)
    )


def compiled_step(stage: Stage, state: TrainState, frozen: Params, batch: Any, options: Options, mesh: Mesh) -> Step:
    """The step of these shapes, compiled for the devices of the mesh; nothing is allocated."""
    step: Any = make_train_step(stage.loss, options, mesh, state, stage.dtypes, stage.reads_state)
    compiled = step.lower(state, frozen, batch).compile()
    communication = collectives.collectives(compiled.as_text(), mesh.shape)
    return Step(compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"], communication)


def report(usage: Memory, step: Step | None, mesh: Mesh | AbstractMesh, params: Params) -> str:
    """The plan as text: sharding of parameters, bytes on each device, and the communication of a step."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    rows = {
        "parameters": usage.params,
        "optimizer": usage.optimizer,
        "moving average": usage.average,
        "frozen parameters": usage.frozen,
        "batch": usage.batch,
        "gradients": usage.gradients,
    }
    if step is not None:  # the temporary memory includes the gradients
        rows["activations and gathered parameters"] = max(step.temporary - usage.gradients, 0)
    rows["all" if step is not None else "all but activations"] = sum(rows.values())
    lines = [parallel.sharding_table(mesh, params), "", f"GB a device, of {mesh.size} devices ({shape})"]
    lines += [f"  {name:36} {size / 1e9:8.3f}" for name, size in rows.items()]
    if step is not None:
        lines += ["", f"One step: {step.flops / 1e12:.3f} TFLOP a device", collectives.collectives_table(step.sent)]
    return "\n".join(lines)
