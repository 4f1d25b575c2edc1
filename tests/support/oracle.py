"""The PyTorch side of the comparisons: the small networks as diffusers and transformers build and run them.

Imported only by tests that have asked for torch with `pytest.importorskip`, and by `make_golden.py`.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.support import networks


@torch.no_grad()
def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the weights of `networks.draw`; some versions put a prefix before the names."""
    for name, p in model.named_parameters():
        name = name.removeprefix("text_model.").removeprefix("vision_model.")
        p.copy_(torch.from_numpy(networks.draw(name, tuple(p.shape))))
    return model.eval()


def unet(name: str) -> torch.nn.Module:
    return drawn(UNet2DConditionModel(**networks.UNETS[name]))


def vae(name: str) -> torch.nn.Module:
    return drawn(AutoencoderKL(**networks.VAES[name]))


def text(name: str) -> torch.nn.Module:
    values = dict(networks.TEXTS[name])
    cls = CLIPTextModelWithProjection if values.pop("with_projection", False) else CLIPTextModel
    return drawn(cls(CLIPTextConfig(**values)))


def vision() -> torch.nn.Module:
    return drawn(CLIPVisionModelWithProjection(CLIPVisionConfig(**networks.SMALL_VISION)))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


@torch.no_grad()
def run_unet(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    get = {k: torch.from_numpy(v) for k, v in inputs.items() if k != "x"}
    added = {"text_embeds": get["pooled"], "time_ids": get["time_ids"]} if "pooled" in get else None
    output = model(
        nchw(inputs["x"]),
        get["t"],
        get["embeddings"],
        class_labels=get.get("class_labels"),
        timestep_cond=get.get("guidance"),
        added_cond_kwargs=added,
    )
    return {"output": nhwc(output.sample)}


@torch.no_grad()
def run_vae(model: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    gaussian = model.encode(nchw(images)).latent_dist
    decoded = model.decode(gaussian.mean).sample
    return {"mean": nhwc(gaussian.mean), "logvar": nhwc(gaussian.logvar), "decoded": nhwc(decoded)}


@torch.no_grad()
def run_text(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    output = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    pooled = {"projected": output.text_embeds} if "text_embeds" in output else {"pooled": output.pooler_output}
    tensors = {"last_hidden_state": output.last_hidden_state, "second_to_last": output.hidden_states[-2], **pooled}
    return {k: v.numpy() for k, v in tensors.items()}


@torch.no_grad()
def run_vision(model: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return {"image_embeds": model(nchw(pixels)).image_embeds.numpy()}


def cases() -> dict[str, tuple]:
    """Every comparison: "kind/name" -> (a function that builds the model, one that runs it, its input)."""
    images = networks.uniform_images(2, 16, 24, 3)
    pixels = networks.uniform_images(2, 32, 32, 3)
    unets = {f"unet/{n}": (lambda n=n: unet(n), run_unet, networks.unet_inputs(c)) for n, c in networks.UNETS.items()}
    # 9 rows do not halve evenly; 32 x 32 positions are many enough for attention in chunks.
    odd = {
        f"unet/sd1/{side}": (lambda: unet("sd1"), run_unet, networks.unet_inputs(networks.UNETS["sd1"], side))
        for side in (9, 32)
    }
    vaes = {f"vae/{n}": (lambda n=n: vae(n), run_vae, images) for n in networks.VAES}
    texts = {f"text/{n}": (lambda n=n: text(n), run_text, networks.TOKENS) for n in networks.TEXTS}
    return unets | odd | vaes | texts | {"vision/small": (vision, run_vision, pixels)}


def save(model: torch.nn.Module, folder: Path) -> Path:
    """Config and safetensors as the PyTorch libraries write them; returns the weights' file."""
    model.save_pretrained(folder, safe_serialization=True)
    (weights,) = folder.glob("*.safetensors")
    return weights
