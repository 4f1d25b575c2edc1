"""The speed of a run, compared with the peak of its devices, and its memory."""

import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Dense (not sparse) bfloat16 products that add in float32, FLOP/s of one device as JAX counts them, by the beginning of
# its `device_kind`. Published, and looked up there:
# - TPUs: docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e, "peak compute per chip (bf16)". A v3 device is one of
#   the two cores of a chip.
# - A100, H100, H200, B200: nvidia.com/en-us/data-center; but for A100 figures with sparsity, halved here. L4, L40 and
#   L40S: their data sheets. V100, T4: theirs, of float16, as they have no bfloat16.
# - GeForce: NVIDIA's Ada and RTX Blackwell whitepapers, "Peak BF16 Tensor TFLOPS with FP32 Accumulate".
PEAKS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla V100-PCIE": 112e12,
    "Tesla T4": 65e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}
VARIANTS = re.compile(r"\bMIG\b|\bLaptop\b| D( v\d)?$")  # parts of a device, and slower devices of the same name


@dataclasses.dataclass(frozen=True)
class Speed:
    """Converts steps per second to the metrics of a run."""

    flops: float | None  # of one step on all devices; None where XLA does not report them
    peak: float | None  # FLOP/s of all devices together; None if unknown
    devices: tuple[Any, ...]  # of this host, whose memory is measured

    def values(self, steps_per_second: float) -> dict[str, float]:
        """FLOP/s of all devices, model FLOPs utilisation (Chowdhery et al. 2022, appendix B), and memory in bytes.

        The memory is that in use and at the peak, of the device of this host with most.
        """
        metrics = {}
        if self.flops:
            metrics["flops_per_second"] = self.flops * steps_per_second
            if self.peak:
                metrics["mfu"] = metrics["flops_per_second"] / self.peak
        return metrics | {name: float(value) for name, value in memory(self.devices).items()}


def flops(function: Any, *args: Any) -> float | None:
    """Floating-point operations of one call by XLA's count, on all devices together; nothing is compiled or run.

    Args:
        function: a result of `jax.jit`. Bodies of loops count once.
        args: arrays, or shapes with types.
    """
    cost = function.lower(*args).cost_analysis()
    return float(cost["flops"]) if cost and cost.get("flops", 0) > 0 else None


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Peak FLOP/s of these devices together, from PEAKS; of CPUs as measured by a float32 matrix product.

    None for devices that PEAKS does not list.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _matmul_flops() * len({d.process_index for d in devices})  # the devices of a process share its cores
    matches = [name for name in PEAKS if re.match(rf"{re.escape(name)}\b", kind) and not VARIANTS.search(kind)]
    return PEAKS[max(matches, key=len)] * len(devices) if matches else None


@functools.cache
def _matmul_flops(size: int = 1024) -> float:
    """FLOP/s of the best of three products of float32 matrices."""
    x = jnp.ones((size, size), jnp.float32)
    run = jax.jit(jnp.matmul)
    run(x, x).block_until_ready()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def memory(devices: Sequence[Any]) -> dict[str, int]:
    """Bytes of memory in use and at the peak, of the device with most; {} where the backend reports none (CPUs)."""
    stats = [d.memory_stats() or {} for d in devices]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats if key in s) for name, key in names.items() if any(key in s for s in stats)}
