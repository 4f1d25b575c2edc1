"""Loading and saving ControlNets: diffusers' folders, and files in the original layout."""

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
from jaxdiff.io.modules import CONFIG, load_module, require_path, save_module, without_config
from jaxdiff.io.original_layout import UNET_PREFIX, place
from jaxdiff.io.strays import drop_strays, warn_skipped, without_strays
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors, without_prefix
from jaxdiff.io.torch_names import tensor_name
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.typing import Params

PIPELINE_PREFIX = "controlnet."  # of all names in a file saved from a whole pipeline
# The first is of the original layout, whose files may also hold the whole model.
PREFIXES = ("control_model.", PIPELINE_PREFIX, "")
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
        path: a folder as diffusers writes it, or its file of weights. Without `config.json` beside it, and in the
            original layout, the config is inferred from the tensors.
        dtype: dtype of computation and parameters, "float32" by default.
        variant: of a folder's weights, such as "fp16".
        like: the config of the UNet to control, for settings that cannot be inferred from tensors, such as the number
            of heads; by default the published Stable Diffusion's.
        mesh: to shard the parameters over as they are read; see `load`.

    Raises:
        ConfigError, WeightsError: one sentence that names the file and the fix.
    """
    if not Path(path).is_file():
        return load_module(path, ControlNetConfig, ControlNet, example_inputs, dtype, variant, mesh)
    source, dtype = _open(path), check_dtype(dtype)
    if HINT.format(0) in source.shapes:
        return _load_original(source, dtype, like, mesh)
    config_path = source.path  # for error messages
    if without_config(path):
        config: Any = controlnet_config(source, controlnet_shapes(source), like)
    else:
        config_path = source.path.parent / CONFIG
        config = read_config(config_path, ControlNetConfig)
    controlnet = ControlNet(config, dtype=dtype)
    shapes = module_shapes(controlnet, example_inputs, config_path)
    return controlnet, load_tensors(without_strays(source, shapes), shapes, dtype, mesh)


def check_controlnet(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path is not a ControlNet; no weights are read."""
    if require_path(path, ControlNetConfig).is_dir():
        read_config(Path(path) / CONFIG, ControlNetConfig)
    else:
        _open(path)


def _open(path: str | Path) -> TensorSource:
    """The unread tensors of a ControlNet's file, without their prefix. Raises WeightsError for other files."""
    source = open_tensors(path)
    candidates = {
        n.removesuffix(ending) for n in source.shapes for ending in (HINT.format(0), CONDITION) if n.endswith(ending)
    }
    prefixes = [prefix for prefix in PREFIXES if prefix in candidates] or sorted(
        p for p in candidates if p.endswith(".")
    )
    if not candidates and source.shapes and all(name.startswith(PIPELINE_PREFIX) for name in source.shapes):
        source = without_prefix(source, PIPELINE_PREFIX)  # so that `kinds` recognizes other networks
    kinds.refuse_control(source)
    if not prefixes:
        kinds.refuse(source, "a ControlNet")
        raise WeightsError(f"{path} holds no ControlNet: it lacks the tensor {CONDITION}.")
    if prefixes[0] not in PREFIXES and len(prefixes) > 1:
        raise WeightsError(
            f"{path} holds several ControlNets, at {prefixes[0]} and {prefixes[1]}: give a file of one each."
        )
    controlnet = without_prefix(source, prefixes[0])
    kinds.refuse_control(controlnet)
    if not any(name.startswith(UNET_PREFIX) for name in source.shapes):  # not inside a whole checkpoint
        warn_skipped(source, [name for name in source.shapes if not name.startswith(prefixes[0])])
    return controlnet


def save_controlnet(folder: str | Path, controlnet: ControlNet, params: Params, *, dtype: Any = None) -> None:
    """Write a ControlNet as a folder that PyTorch diffusers opens; raises WeightsError if it cannot be written."""
    save_module(folder, controlnet, params, dtype=dtype)


def _load_original(
    source: TensorSource, dtype: Any, like: UNetConfig | None, mesh: Mesh | None
) -> tuple[ControlNet, Params]:
    """The ControlNet of a file in the original layout."""
    controlnet = ControlNet(controlnet_config(source, Shapes(source, ""), like), dtype=dtype)
    shapes, table = module_shapes(controlnet, example_inputs, source.path), controlnet_table(controlnet.config)
    file_names = {}
    for path in flatten_dict(shapes):
        location = place(tensor_name(path), table, "")
        if location is not None and location.name in source.shapes:
            file_names[tensor_name(path)] = location.name
    # Unknown tensors keep their names, so that load_tensors reports them.
    unused = source.shapes.keys() - set(file_names.values())
    file_names |= {name: name for name in drop_strays(source, unused, file_names.values())}
    renamed_shapes = {name: source.shapes[file_name] for name, file_name in file_names.items()}
    renamed = TensorSource(source.path, renamed_shapes, lambda name: source.read(file_names[name]))
    return controlnet, load_tensors(renamed, shapes, dtype, mesh)
