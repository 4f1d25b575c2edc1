"""Loading and saving models: diffusers folders, single-file checkpoints, bundled models and the Hugging Face hub."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxdiff import stores
from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.files import writing
from jaxdiff.io.diffusers_folder import CONTROLNET, INDEX, is_part, load_folder, load_model, save_folder
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
    transformer: str | Path | None = None,
    parts: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, Params]:
    """Load a model and its parameters.

    Args:
        name_or_path: a diffusers folder, a single-file checkpoint (.safetensors, .ckpt, …), the name of a bundled model
            ("icons"), "owner/name" on the Hugging Face hub ("owner/name@v1.0" at a branch, tag or commit), or a path
            gs://bucket/… or s3://bucket/…, of which a local copy is kept.
        dtype: dtype of computation and parameters: "float32" (default), "bfloat16" or "float16".
        variant: of a folder's weights: "fp16" reads `*.fp16.safetensors`, and falls back to files without a variant;
            None prefers files without a variant.
        prediction_type: what the UNet was trained to predict, "epsilon", "v_prediction", …, if the file does not say so
            or is wrong: for instance, one-file checkpoints of SD 2.x for 512 pixels predict epsilon.
        remat: recompute activations in the backward pass, for gradients through large models.
        vae: an autoencoder to replace the model's, which may then lack one; see `load_vae`.
        transformer: a file to replace the folder's transformer, whose weights may then be missing: in diffusers' names
            or the original layout, with or without ComfyUI's prefix; `.gguf` as well.
        parts: the networks whose parameters are read, of `model.modules` ("text_encoder", "unet", …); None reads all.
        mesh: from `jaxdiff.parallel.mesh(fsdp=…, tensor=…)`, for models larger than a device: the parameters are
            sharded over it as they are read, and `generate` runs there.

    Returns:
        The model, static under `jit`, with the ControlNets that its folder lists, and its parameters on the default
        device or the mesh. Each tensor is copied from the memory-mapped file directly to its device, so that the peak
        memory is the parameters and one tensor.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    path = find(name_or_path, variant)
    options: Any = {
        "prediction_type": prediction_type, "remat": remat, "without_vae": vae is not None, "mesh": mesh, "parts": parts
    }  # fmt: skip
    if path.is_file():
        if transformer is not None:
            raise ConfigError(f"transformer goes with a folder, which has the rest of the model; {path} is a file.")
        model, params = load_single_file(path, dtype, **options)
    else:
        file = None if transformer is None else Path(transformer)
        model, params = load_folder(path, dtype, variant=variant, transformer=file, **options)
    replace_vae = vae is not None and (parts is None or "vae" in parts)
    return load_vae(model, params, vae, mesh=mesh) if replace_vae else (model, params)  # type: ignore[arg-type]


def described(path: Path, dtype: Any = None, **options: Any) -> tuple[Model, bool]:
    """The model at a path without its weights, and whether it has its own autoencoder.

    Args:
        dtype, options: as for `load_model` and `open_single_file`.
    """
    if path.is_dir():
        return load_model(path, dtype, **options), (path / "vae" / CONFIG).is_file()
    model, sources = open_single_file(path, dtype, **options)
    return model, "vae" in sources


def save(folder: str | Path, model: Model, params: Params, *, dtype: Any = None) -> None:
    """Write a diffusers folder that PyTorch diffusers and `load` open, atomically.

    ControlNets are included if `params` holds theirs, as "controlnet".

    Args:
        folder: created if missing. In a model's folder, the model is replaced and other files stay; any other non-empty
            folder is refused. A name that ends in .safetensors makes a single-file checkpoint. A path gs://bucket/… or
            s3://bucket/… is uploaded, `model_index.json` last; an earlier model is unavailable meanwhile.
        dtype: dtype of the tensors written; unchanged by default.

    Raises:
        WeightsError: the folder cannot be written, or holds something else.
    """
    if stores.wrong(folder) or stores.is_store(folder):
        _save_to_store(str(folder), model, params, dtype)
        return
    folder = Path(folder)
    if CONTROLNET not in params:
        model = dataclasses.replace(model, controlnets=())
    if folder.suffix.lower() in SINGLE_FILES:
        save_single_file(folder, model, params, dtype)
    else:
        save_folder(folder, model, params, dtype)


def _save_to_store(url: str, model: Model, params: Params, dtype: Any) -> None:
    """Write a model locally, then upload it; `model_index.json`, without which no model is opened, last."""
    try:
        as_file = Path(url).suffix.lower() in SINGLE_FILES
        place = stores.place(url, stores.OUTPUTS if as_file else "saved")
        with writing(place, WeightsError, "choose another place or free it."):
            place.parent.mkdir(parents=True, exist_ok=True)
        if as_file:
            save(place, model, params, dtype=dtype)  # files in OUTPUTS are uploaded
            return
        top_names = {name.split("/")[0] for name in stores.listing(url)}
        if INDEX not in top_names and any(not is_part(top) for top in top_names):
            raise WeightsError(f"{url} exists and is not the folder of a model: save to another one.")
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
            save(Path(temporary) / "new", model, params, dtype=dtype)
            stores.publish(Path(temporary) / "new", url, INDEX)
    except stores.StoreError as e:
        raise WeightsError(str(e)) from None


def parts(model: Model, params: Params) -> Params:
    """The parameters of the model's modules and ControlNets, without any others."""
    return {name: params[name] for name in (*model.modules, *([CONTROLNET] if model.controlnets else ()))}
