"""The PyTorch side of ControlNets; imported only by tests that have asked for torch."""

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from tests.support.oracle import drawn, nchw, nhwc


def controlnet(config: dict) -> ControlNetModel:
    """With random weights everywhere, its zero convolutions too."""
    return drawn(ControlNetModel(**config))


def unet(config: dict) -> UNet2DConditionModel:
    return drawn(UNet2DConditionModel(**config))


@torch.no_grad()
def run(net, unet, inputs: dict[str, np.ndarray], hints: list[np.ndarray], scales: list[float]) -> list:
    """Unscaled residuals by each hint, their scaled sum, and the UNet's output with that."""
    get = {k: torch.from_numpy(v) for k, v in inputs.items() if k not in ("x", "hint")}
    added = {"text_embeds": get["pooled"], "time_ids": get["time_ids"]} if "pooled" in get else None
    args = (nchw(inputs["x"]), get["t"], get["embeddings"])

    def residuals(hint, scale):
        out = net(*args, nchw(hint), conditioning_scale=scale, added_cond_kwargs=added)
        return list(out.down_block_res_samples), out.mid_block_res_sample

    each = [residuals(hint, 1.0) for hint in hints]
    scaled = [residuals(hint, scale) for hint, scale in zip(hints, scales, strict=True)]
    down = [sum(parts) for parts in zip(*(d for d, _ in scaled), strict=True)]
    mid = sum(m for _, m in scaled)
    output = unet(
        *args,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    return [([nhwc(d) for d in down], nhwc(mid)) for down, mid in [*each, (down, mid)]] + [nhwc(output)]
