"""ControlNets in and out: diffusers' folders, and files in the original layout."""

from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jaxdiff.config import ControlNetConfig, UNetConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io import kinds
from jaxdiff.io.configs import check_dtype, module_shapes, read_config
from jaxdiff.io.infer_config import Shapes
from jaxdiff.io.infer_diffusers import HINT, controlnet_config, controlnet_shapes, controlnet_table
from jaxdiff.io.modules import CONFIG, existing, load_module, save_module, without_config
from jaxdiff.io.original_layout import place
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors
from jaxdiff.io.torch_names import tensor_name
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.typing import Params

PREFIXES = ("control_model.", "")  # of the original layout, in which the whole model may stand beside the ControlNet
CONDITION = "controlnet_cond_embedding.conv_in.weight"  # diffusers' name of the original layout's first hint block


def load_controlnet(
    path: str | Path,
    *,
    dtype: Any = None,
    variant: str | None = None,
    like: UNetConfig | None = None,
    mesh: Mesh | None = None,
) -> tuple[ControlNet, Params]:
    """A ControlNet and its parameters.

    Args:
        path: a folder as diffusers writes it, or its file of weights; without `config.json` beside it, and in the
            original layout, the config follows from its tensors.
        dtype: type to compute in and to hold the parameters in, "float32" by default.
        variant: of a folder's weights, such as "fp16".
        like: the config of the UNet that it is to steer, for what no tensor of a file tells, such as the number of
            heads; by default as in the published Stable Diffusion.
        mesh: what the parameters are divided over as they are read; see `load`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    if not Path(path).is_file():
        return load_module(path, ControlNetConfig, ControlNet, example_inputs, dtype, variant, mesh)
    source = _open(path)
    for prefix in PREFIXES:
        if prefix + HINT.format(0) in source.shapes:
            return load_original(source, prefix, dtype, like, mesh)
    if not without_config(path):
        return load_module(path, ControlNetConfig, ControlNet, example_inputs, dtype, variant, mesh)
    controlnet = ControlNet(controlnet_config(source, controlnet_shapes(source), like), dtype=check_dtype(dtype))
    shapes = module_shapes(controlnet, example_inputs, source.path)
    return controlnet, load_tensors(source, shapes, controlnet.dtype, mesh)


def check_controlnet(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path holds something else, before any weights are read."""
    if existing(path, ControlNetConfig).is_dir():
        read_config(Path(path) / CONFIG, ControlNetConfig)
    else:
        _open(path)


def _open(path: str | Path) -> TensorSource:
    """The tensors of a ControlNet's file, unread. Raises WeightsError if it is something else."""
    source = open_tensors(path)
    kinds.refuse_control(source)
    if not any(f"{prefix}{name}" in source.shapes for prefix in PREFIXES for name in (HINT.format(0), CONDITION)):
        kinds.refuse(source, "a ControlNet")
        raise WeightsError(f"{path} holds no ControlNet: it lacks the tensor {CONDITION}.")
    return source


def save_controlnet(folder: str | Path, controlnet: ControlNet, params: Params, *, dtype: Any = None) -> None:
    """Write a ControlNet as a folder that PyTorch diffusers opens; raises WeightsError if it cannot be written."""
    save_module(folder, controlnet, params, dtype=dtype)


def load_original(
    source: TensorSource,
    prefix: str,
    dtype: Any = None,
    like: UNetConfig | None = None,
    mesh: Mesh | None = None,
) -> tuple[ControlNet, Params]:
    """The ControlNet among the tensors of an original file whose names start with `prefix`."""
    dtype = check_dtype(dtype)
    controlnet = ControlNet(controlnet_config(source, Shapes(source, prefix), like), dtype=dtype)
    shapes, table = module_shapes(controlnet, example_inputs, source.path), controlnet_table(controlnet.config)
    found = {}
    for path in flatten_dict(shapes):
        where = place(tensor_name(path), table, prefix)
        if where is not None and where.name in source.shapes:
            found[tensor_name(path)] = where.name
    # What has no place keeps its name, for load_tensors to say so.
    found |= {name: name for name in set(source.shapes) - set(found.values()) if name.startswith(prefix)}
    renamed = {ours: source.shapes[theirs] for ours, theirs in found.items()}
    ours = TensorSource(source.path, renamed, lambda name: source.read(found[name]))
    return controlnet, load_tensors(ours, shapes, dtype, mesh)
