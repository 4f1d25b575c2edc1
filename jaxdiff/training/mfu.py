"""How fast a run is, against what its devices could do, and the memory that it holds."""

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
OTHERS = re.compile(r"\bMIG\b|\bLaptop\b| D( v\d)?$")  # parts of a device, and slower ones of the same name


@dataclasses.dataclass(frozen=True)
class Speed:
    """What turns steps a second into the metrics of a run."""

    flops: float | None  # of one step on all devices; None where XLA does not tell
    peak: float | None  # FLOP/s of all devices together; None where it is not known
    devices: tuple[Any, ...]  # of this host, whose memory is looked at

    def values(self, steps_per_second: float) -> dict[str, float]:
        """FLOP/s of all devices, the share of their peak that is (model FLOPs utilisation, Chowdhery et al. 2022,
        appendix B), and the memory that the fullest device of this host holds and has held, in bytes."""
        found = {}
        if self.flops:
            found["flops_per_second"] = self.flops * steps_per_second
            if self.peak:
                found["mfu"] = found["flops_per_second"] / self.peak
        return found | {name: float(value) for name, value in memory(self.devices).items()}


def flops(function: Any, *args: Any) -> float | None:
    """Floating-point operations of one call by XLA's count, on all devices together; nothing is compiled or run.

    Args:
        function: what `jax.jit` returned. Bodies of loops count once.
        args: arrays, or shapes with types.
    """
    cost = function.lower(*args).cost_analysis()
    return float(cost["flops"]) if cost and cost.get("flops", 0) > 0 else None


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s that these devices can do together, by PEAKS; for CPUs as measured by a float32 matrix product.

    None for devices that PEAKS does not know: no utilisation is better than a wrong one.
    """
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _measured() * len({d.process_index for d in devices})  # the devices of a process share its cores
    known = [name for name in PEAKS if re.match(rf"{re.escape(name)}\b", kind) and not OTHERS.search(kind)]
    return PEAKS[max(known, key=len)] * len(devices) if known else None


@functools.cache
def _measured(size: int = 1024) -> float:
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
    """Bytes of memory in use and at the peak, of the device with most; none where the backend does not tell (CPUs)."""
    stats = [d.memory_stats() or {} for d in devices]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats if key in s) for name, key in names.items() if any(key in s for s in stats)}
