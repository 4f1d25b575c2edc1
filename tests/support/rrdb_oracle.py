"""The network of Real-ESRGAN in PyTorch, written from its published architecture and the names in its files."""

import torch
from torch import nn
from torch.nn import functional as F


class Dense(nn.Module):
    def __init__(self, features: int, grow: int):
        super().__init__()
        for i in range(1, 6):
            out = features if i == 5 else grow
            self.add_module(f"conv{i}", nn.Conv2d(features + (i - 1) * grow, out, 3, 1, 1))

    def forward(self, x):
        seen = [x]
        for i in range(1, 5):
            seen.append(F.leaky_relu(getattr(self, f"conv{i}")(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(seen, 1))


class Block(nn.Module):
    def __init__(self, features: int, grow: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (Dense(features, grow) for _ in range(3))

    def forward(self, x):
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class TorchRRDBNet(nn.Module):
    def __init__(self, blocks: int = 23, features: int = 64, grow: int = 32, scale: int = 4):
        super().__init__()
        self.unshuffle = {4: 1, 2: 2, 1: 4}[scale]
        self.conv_first = nn.Conv2d(3 * self.unshuffle**2, features, 3, 1, 1)
        self.body = nn.Sequential(*(Block(features, grow) for _ in range(blocks)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            nn.Conv2d(features, features, 3, 1, 1) for _ in range(4)
        )
        self.conv_last = nn.Conv2d(features, 3, 3, 1, 1)

    def forward(self, x):
        if self.unshuffle > 1:
            x = F.pixel_unshuffle(x, self.unshuffle)
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))


def first_names(state: dict) -> dict:
    """A state dict under the names of the first ESRGAN, whose layers are numbered."""
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("body."))
    tops = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}", "conv_up1": "model.3", "conv_up2": "model.6",
            "conv_hr": "model.8", "conv_last": "model.10"}  # fmt: skip
    found = {}
    for name, x in state.items():
        parts = name.split(".")
        if parts[0] == "body":
            name = f"model.1.sub.{parts[1]}.{parts[2].upper()}.{parts[3]}.0.{parts[4]}"
        else:
            name = f"{tops[parts[0]]}.{parts[1]}"
        found[name] = x
    return found


def later_names(state: dict) -> dict:
    """A state dict under the names of the later ESRGAN."""
    found = {}
    for name, x in state.items():
        name = name.replace("body.", "RRDB_trunk.").replace("conv_RRDB_trunk", "trunk_conv").replace(".rdb", ".RDB")
        found[name.replace("conv_up", "upconv").replace("conv_hr", "HRconv")] = x
    return found
