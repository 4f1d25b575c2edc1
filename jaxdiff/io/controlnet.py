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
from jaxdiff.io.original_layout import UNET_PREFIX, place
from jaxdiff.io.strays import only_own, pass_over, without_strays
from jaxdiff.io.tensor_files import TensorSource, load_tensors, open_tensors, without_prefix
from jaxdiff.io.torch_names import tensor_name
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.typing import Params

NAMED = "controlnet."  # before all names of a file that was saved out of a pipeline
PREFIXES = ("control_model.", NAMED, "")  # the first of the original layout, which may hold the whole model beside
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
    source, dtype = _open(path), check_dtype(dtype)
    if HINT.format(0) in source.shapes:
        return _load_original(source, dtype, like, mesh)
    named = source.path  # what describes it
    if without_config(path):
        config: Any = controlnet_config(source, controlnet_shapes(source), like)
    else:
        named = source.path.parent / CONFIG
        config = read_config(named, ControlNetConfig)
    controlnet = ControlNet(config, dtype=dtype)
    shapes = module_shapes(controlnet, example_inputs, named)
    return controlnet, load_tensors(without_strays(source, shapes), shapes, dtype, mesh)


def check_controlnet(path: str | Path) -> None:
    """Raise ConfigError or WeightsError if a path holds something else, before any weights are read."""
    if existing(path, ControlNetConfig).is_dir():
        read_config(Path(path) / CONFIG, ControlNetConfig)
    else:
        _open(path)


def _open(path: str | Path) -> TensorSource:
    """The unread tensors of a ControlNet's file, without their prefix. Raises WeightsError for other files."""
    source = open_tensors(path)
    found = {n.removesuffix(end) for n in source.shapes for end in (HINT.format(0), CONDITION) if n.endswith(end)}
    prefixes = [prefix for prefix in PREFIXES if prefix in found] or sorted(p for p in found if p.endswith("."))
    if not found and source.shapes and all(name.startswith(NAMED) for name in source.shapes):
        source = without_prefix(source, NAMED)  # what it is, if no ControlNet, is told by the names without it
    kinds.refuse_control(source)
    if not prefixes:
        kinds.refuse(source, "a ControlNet")
        raise WeightsError(f"{path} holds no ControlNet: it lacks the tensor {CONDITION}.")
    if prefixes[0] not in PREFIXES and len(prefixes) > 1:
        raise WeightsError(
            f"{path} holds several ControlNets, at {prefixes[0]} and {prefixes[1]}: give a file of one each."
        )
    own = without_prefix(source, prefixes[0])
    kinds.refuse_control(own)
    if not any(name.startswith(UNET_PREFIX) for name in source.shapes):  # beside a whole model
        pass_over(source, [name for name in source.shapes if not name.startswith(prefixes[0])])
    return own


def save_controlnet(folder: str | Path, controlnet: ControlNet, params: Params, *, dtype: Any = None) -> None:
    """Write a ControlNet as a folder that PyTorch diffusers opens; raises WeightsError if it cannot be written."""
    save_module(folder, controlnet, params, dtype=dtype)


def _load_original(
    source: TensorSource, dtype: Any, like: UNetConfig | None, mesh: Mesh | None
) -> tuple[ControlNet, Params]:
    """The ControlNet of a file in the original layout."""
    controlnet = ControlNet(controlnet_config(source, Shapes(source, ""), like), dtype=dtype)
    shapes, table = module_shapes(controlnet, example_inputs, source.path), controlnet_table(controlnet.config)
    found = {}
    for path in flatten_dict(shapes):
        where = place(tensor_name(path), table, "")
        if where is not None and where.name in source.shapes:
            found[tensor_name(path)] = where.name
    # What has no place keeps its name, for load_tensors to say so.
    found |= {n: n for n in only_own(source, source.shapes.keys() - set(found.values()), found.values())}
    renamed = {ours: source.shapes[theirs] for ours, theirs in found.items()}
    ours = TensorSource(source.path, renamed, lambda name: source.read(found[name]))
    return controlnet, load_tensors(ours, shapes, dtype, mesh)
