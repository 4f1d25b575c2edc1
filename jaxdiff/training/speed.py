"""How fast a run is, against what its devices could do, and the memory that it holds."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 matrix products, FLOP/s of one device as JAX counts them, by the start of `device_kind`. From the
# makers' sheets: cloud.google.com/tpu/docs/system-architecture-tpu-vm (a v2 or v3 device is half a chip); NVIDIA's
# of A100, H100, H200, L4, L40S, V100 and T4 (these two: float16); its Ada and Blackwell whitepapers for the RTX cards.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


@dataclasses.dataclass(frozen=True)
class Speed:
    """What turns steps a second into the metrics of a run."""

    flops: float | None  # of one step on all devices; None where XLA does not tell
    peak: float | None  # FLOP/s of all devices together; None where it is not known
    devices: tuple[Any, ...]  # of this host, whose memory is looked at

    def values(self, steps_per_second: float) -> dict[str, float]:
        """FLOP/s of all devices, the share of their peak that is (model FLOPs utilisation, Chowdhery et al. 2022,
        appendix B), and the most memory that a device of this host has held, in bytes."""
        found = {}
        if self.flops:
            found["flops_per_second"] = self.flops * steps_per_second
            if self.peak:
                found["mfu"] = found["flops_per_second"] / self.peak
        if held := memory(self.devices):
            found["memory_peak_bytes"] = float(held)
        return found


def flops(function: Any, *args: Any) -> float | None:
    """Floating-point operations of one call by XLA's count, on all devices together; nothing is compiled or run.

    Args:
        function: what `jax.jit` returned. Bodies of loops count once.
        args: arrays, or shapes with types.
    """
    cost = function.lower(*args).cost_analysis()
    return float(cost["flops"]) if cost and cost.get("flops", 0) > 0 else None


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s that these devices can do together: by PEAKS, and for CPUs as measured by a float32 matrix product."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return _measured() * len({d.process_index for d in devices})  # the devices of a process share its cores
    known = [name for name in PEAKS if kind.startswith(name)]
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


def memory(devices: Sequence[Any]) -> int | None:
    """The most bytes that one of these devices has held; None where the backend does not tell, as on CPUs."""
    stats = [d.memory_stats() for d in devices]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)
