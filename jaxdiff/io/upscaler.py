"""Loading upscaling networks from files in ESRGAN's and Real-ESRGAN's layouts, and saving to the latter.

Three layouts of one architecture are recognized by their names: Real-ESRGAN's (`conv_first`, `body.0.rdb1.conv1`), the
later ESRGAN's (`RRDB_trunk.0.RDB1.conv1`, `trunk_conv`, `upconv1`, `HRconv`), and the first ESRGAN's, which counts the
layers of a `torch.nn.Sequential` (`model.0`, `model.1.sub.0.RDB1.conv1.0`). All sizes are inferred from the tensors.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxdiff.config.upscaler import RRDBConfig
from jaxdiff.errors import WeightsError, say_once
from jaxdiff.io.model_paths import BUNDLED
from jaxdiff.io.tensor_files import PICKLES, SAFETENSORS, TensorSource, named_tensors, open_tensors, write_tensors
from jaxdiff.io.tensor_files import load_tensors as read_into
from jaxdiff.io.torch_names import tensor_name, torch_shape
from jaxdiff.models.rrdb import RRDBNet, param_shapes
from jaxdiff.typing import Params

DEFAULT = "icons"  # bundled network
FOLDER = BUNDLED / "upscaler"
FILE = "upscaler.safetensors"  # in an exported folder
GROUPS = ("params_ema.", "params-ema.", "params.", "")  # prefixes in files; the moving average is preferred
LATER = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "HRconv": "conv_hr", "upconv": "conv_up", "RDB": "rdb"}
MOST = {"num_block": 1000, "num_feat": 4096, "num_grow_ch": 4096, "upsamples": 4}
OTHER = "is not a network of residual-in-residual dense blocks (RRDBNet, of ESRGAN and Real-ESRGAN)"


def bundled_upscalers() -> list[str]:
    """Names of the networks that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def find_upscaler(name_or_path: str | Path) -> Path:
    """The file of a network, given by its path, the folder that training exported, or a bundled name.

    Raises:
        WeightsError: there is no such file or name.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if name in bundled_upscalers() and not (path / FILE).is_file():
        if path.exists():
            say_once(f"{name} is the bundled upscaler; ./{name} is not an upscaler.")
        return FOLDER / f"{name}.safetensors"
    if path.is_dir() and not (path / FILE).is_file():
        raise WeightsError(f"{path} is a folder without {FILE}: give the network's file.")
    if path.is_dir():
        return path / FILE
    if path.is_file():
        return path
    known = ", ".join(bundled_upscalers()) or "none"
    raise WeightsError(f"{name_or_path} is neither a file nor a bundled upscaler (bundled: {known}): check the path.")


def open_upscaler(name_or_path: str | Path) -> tuple[RRDBConfig, TensorSource]:
    """The config of a network and its unread tensors, under Real-ESRGAN's names.

    Raises:
        WeightsError: the file is missing or damaged, or of another architecture.
    """
    path = find_upscaler(name_or_path)
    if path.suffix.lower() not in (*SAFETENSORS, *PICKLES):
        raise WeightsError(f"{path} is not the file of an upscaler: give a .safetensors or .pth file.")
    source = open_tensors(path)
    prefix = next(p for p in GROUPS if not p or any(name.startswith(p) for name in source.shapes))
    inner_names = [name for name in source.shapes if name.startswith(prefix)]
    names = {
        name.removeprefix(prefix).removeprefix("module."): name for name in inner_names
    }  # current name -> the file's
    if "model.0.weight" in names:
        names = _from_sequence(path, names)
    elif any(name.startswith("RRDB_trunk.") for name in names):
        names = {_renamed(name): file_name for name, file_name in names.items()}
    shapes = {name: source.shapes[file_name] for name, file_name in names.items()}
    config = _config(path, shapes)
    _check_tensors(path, shapes, config)
    return config, TensorSource(path, shapes, lambda name: source.read(names[name]), source.metadata)


def _renamed(name: str) -> str:
    """The current name of a tensor of the later ESRGAN."""
    for old, new in LATER.items():
        name = name.replace(old, new)
    return name


def _from_sequence(path: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Current names -> the file's, for the first ESRGAN. Layers without tensors upsample or are activations."""
    top_numbers = sorted({int(n) for name in names for n in re.findall(r"^model\.(\d+)\.(?:weight|bias)$", name)})
    sub_numbers = [int(n) for name in names for n in re.findall(r"^model\.1\.sub\.(\d+)\.", name)]
    if len(top_numbers) < 3 or not sub_numbers:
        raise WeightsError(f"{path} {OTHER}: give another file.")
    parts = {f"model.1.sub.{max(sub_numbers)}": "conv_body", f"model.{top_numbers[0]}": "conv_first"}
    parts |= {f"model.{n}": f"conv_up{i}" for i, n in enumerate(top_numbers[1:-2], 1)}
    parts |= {f"model.{top_numbers[-2]}": "conv_hr", f"model.{top_numbers[-1]}": "conv_last"}
    renamed = {}
    for name, file_name in names.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", stem)
        ours = f"body.{block[1]}.rdb{block[2]}.conv{block[3]}" if block else parts.get(stem, stem)
        renamed[f"{ours}.{kind}"] = file_name
    return renamed


def _config(path: Path, shapes: Mapping[str, list[int]]) -> RRDBConfig:
    """Infer the config of a network from the shapes of its tensors."""
    blocks = {int(n) for name in shapes for n in re.findall(r"^body\.(\d+)\.rdb1\.conv1\.weight$", name)}
    ups = {int(n) for name in shapes for n in re.findall(r"^conv_up(\d+)\.weight$", name)}
    first, grow = (shapes.get(name, []) for name in ("conv_first.weight", "body.0.rdb1.conv1.weight"))
    if not blocks or len(first) != 4 or len(grow) != 4:
        raise WeightsError(f"{path} {OTHER}: give such a file, such as RealESRGAN_x4plus.pth.")
    channels = {3: 1, 12: 2, 48: 4}
    if first[1] not in channels:
        raise WeightsError(
            f"{path}: the network takes {first[1]} channels, not 3, 12 or 48 of colour images: give another."
        )
    sizes = {"num_block": len(blocks), "num_feat": first[0], "num_grow_ch": grow[0], "upsamples": len(ups)}
    config = RRDBConfig(**sizes, unshuffle=channels[first[1]])
    if config.scale < 1 or any(sizes[name] > limit for name, limit in MOST.items()):
        raise WeightsError(f"{path}: a network of {sizes} cannot be built: fetch the file again.")
    return config


def _check_tensors(path: Path, shapes: Mapping[str, list[int]], config: RRDBConfig) -> None:
    """Raise WeightsError if tensors are missing, unknown or of the wrong shape."""
    description = f"a network of {config.num_block} blocks"
    for leaf_path, leaf in flatten_dict(param_shapes(RRDBNet(config))).items():
        name = tensor_name(leaf_path)
        if name not in shapes:
            raise WeightsError(f"{path} lacks the tensor {name} of {description}: fetch it again.")
        expected = torch_shape(leaf_path, leaf.shape)
        if tuple(shapes[name]) != expected:
            raise WeightsError(f"{path}: tensor {name} has shape {shapes[name]}, and {description} {list(expected)}.")
    count = 15 * 2 * config.num_block + 2 * (4 + config.upsamples)  # weights and biases
    if len(shapes) > count:
        known = r"body\.\d+\.rdb[123]\.conv[1-5]\.\w+|conv_(first|body|up\d|hr|last)\.\w+"
        other = min(name for name in shapes if not re.fullmatch(known, name))
        raise WeightsError(
            f"{path} holds {len(shapes) - count} tensors beside {description}, such as {other}: it is another."
        )


def load_upscaler(name_or_path: str | Path = DEFAULT, *, dtype: Any = None) -> tuple[RRDBNet, Params]:
    """An upscaling network and its parameters, for `upscale` and `with_upscaler`.

    Args:
        name_or_path: a `.safetensors` or `.pth` file in ESRGAN's or Real-ESRGAN's layout, the folder that training
            exports, or the name of a bundled network.
        dtype: dtype of computation and parameters; float32 by default.

    Raises:
        WeightsError: the file is missing, damaged or of another architecture.
    """
    config, source = open_upscaler(name_or_path)
    dtype = jnp.dtype(dtype or jnp.float32)
    module = RRDBNet(config, dtype)
    return module, read_into(source, param_shapes(module), dtype)


def save_upscaler(path: str | Path, params: Params, *, dtype: Any = None) -> None:
    """Write a network as one safetensors file in Real-ESRGAN's layout, which `load_upscaler` opens."""
    write_tensors(Path(path), dict(named_tensors(params, dtype)))
