"""Models in and out: diffusers folders, single-file checkpoints, bundled models and the Hugging Face hub."""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdiff.io.diffusers_folder import CONTROLNET, load_folder, load_model, save_folder
from jaxdiff.io.model_paths import SINGLE_FILES, find
from jaxdiff.io.modules import CONFIG
from jaxdiff.io.single_file import load_single_file, open_single_file, save_single_file
from jaxdiff.io.vae import load_vae
from jaxdiff.models.model import Model
from jaxdiff.typing import Params


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    remat: bool = False,
    vae: str | Path | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, Params]:
    """Open a model.

    Args:
        name_or_path: a diffusers folder, a single-file checkpoint (.safetensors, .ckpt, …), the name of a bundled model
            ("icons"), or "owner/name" on the Hugging Face hub ("owner/name@v1.0" at a branch, tag or commit).
        dtype: type to compute in and to hold the parameters in: "float32" (default), "bfloat16" or "float16".
        variant: of a folder's weights: "fp16" reads its `*.fp16.safetensors`, and parts without such a file as without
            a variant; None those without such a word, where there are any.
        prediction_type: what the UNet was trained to predict, "epsilon", "v_prediction", …, where the file does not say
            so or says it wrong: of one-file checkpoints of SD 2.x those for 512 pixels predict epsilon.
        remat: recompute activations in the backward pass, for gradients through large models.
        vae: another autoencoder in place of the model's, which may then lack one; see `load_vae`.
        mesh: of `jaxdiff.parallel.mesh(fsdp=…, tensor=…)`, for models larger than a device: the parameters are divided
            over it as they are read, and `generate` draws there.

    Returns:
        The model, static under `jit`, with the ControlNets that its folder lists, and its parameters on the default
        device or the mesh. Each tensor goes from the memory-mapped file straight to its place, so that the peak of
        memory is the parameters and one tensor.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    path = find(name_or_path, variant)
    more: Any = {"prediction_type": prediction_type, "remat": remat, "without_vae": vae is not None, "mesh": mesh}
    if path.is_file():
        model, params = load_single_file(path, dtype, **more)
    else:
        model, params = load_folder(path, dtype, variant=variant, **more)
    return (model, params) if vae is None else load_vae(model, params, vae, mesh=mesh)


def described(path: Path, dtype: Any = None, **more: Any) -> tuple[Model, bool]:
    """The model that `load` opens at a path, of configs and files' headers, and whether it has an own autoencoder.

    Args:
        dtype, more: as for `load_folder` and `load_single_file`.
    """
    if path.is_dir():
        return load_model(path, dtype, **more), (path / "vae" / CONFIG).is_file()
    model, sources = open_single_file(path, dtype, **more)
    return model, "vae" in sources


def save(folder: str | Path, model: Model, params: Params, *, dtype: Any = None) -> None:
    """Write a diffusers folder that PyTorch diffusers and `load` open; whole or not at all.

    ControlNets go along where `params` holds theirs, as "controlnet".

    Args:
        folder: made; if it is a model's folder already, its model is replaced and other files in it stay; any other
            non-empty folder is refused. A name that ends in .safetensors becomes a single-file checkpoint.
        dtype: type of the tensors written; as they are by default.

    Raises:
        WeightsError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if CONTROLNET not in params:
        model = dataclasses.replace(model, controlnets=())
    if folder.suffix.lower() in SINGLE_FILES:
        save_single_file(folder, model, params, dtype)
    else:
        save_folder(folder, model, params, dtype)


def parts(model: Model, params: Params) -> Params:
    """The parameters of the model's modules and ControlNets, without any others."""
    return {name: params[name] for name in (*model.modules, *([CONTROLNET] if model.controlnets else ()))}
