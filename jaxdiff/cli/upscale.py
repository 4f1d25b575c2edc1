"""sample.py --upscale: enlarge drawn images, or image files, by a network."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxdiff.cli.errors import UsageError, file_errors
from jaxdiff.cli.flags import check_files, flag_errors
from jaxdiff.cli.options import OPTIONS
from jaxdiff.cli.outputs import Writer, check_folder, enlarged_paths, make_folder
from jaxdiff.cli.progress import progress_bar
from jaxdiff.data.listing import IMAGE_SUFFIXES, image_files
from jaxdiff.io import cache
from jaxdiff.io.images import image_size, read_with_alpha
from jaxdiff.io.upscaler import load_upscaler, open_upscaler
from jaxdiff.models.rrdb import RRDBNet
from jaxdiff.sampling.upscale import check_upscale, upscale

Enlarge = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, C] -> uint8 [H', W', C]


def describe_upscaler(f: flags.FlagValues) -> RRDBNet | None:
    """The network of --upscaler, from its file's header; None if it is not used. Raises UsageError."""
    if f.upscale is None and not (f.hires and f.hires_upscale == "network"):
        return None
    with file_errors("--upscaler"):
        return RRDBNet(open_upscaler(f.upscaler)[0], jnp.dtype(f.dtype))


def check_sizes(f: flags.FlagValues, sizes: list[tuple[int, int]]) -> None:
    """Raise UsageError if the network cannot enlarge by --upscale, or if a result does not fit into memory.

    Args:
        sizes: (height, width) of each image.
    """
    network = describe_upscaler(f)
    if f.upscale is None or network is None:
        return
    with flag_errors():
        for size in set(sizes):
            check_upscale(network, *size, f.upscale)


def enlarger(f: flags.FlagValues) -> Enlarge:
    """The function that enlarges an image by --upscale; the identity without that flag."""
    if f.upscale is None:
        return lambda image: image
    with file_errors("--upscaler"):
        module, params = load_upscaler(f.upscaler, dtype=f.dtype)
    return lambda image: upscale(module, params, image, scale=f.upscale, tile=f.upscale_tile)


def input_files(f: flags.FlagValues) -> list[Path]:
    """The image of --image, or those of that folder. Raises UsageError."""
    path = Path(f.image)
    if not path.is_dir():
        return [path]
    files = image_files(path)
    if not files:
        raise UsageError(f"--image: the folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return files


def enlarge_files(f: flags.FlagValues) -> None:
    """Enlarge --image, or each image in that folder, and write the results."""
    check_files(f)
    files = input_files(f)
    paths = enlarged_paths(f.output, files, f.upscale)
    check_folder(paths[0].parent)
    with file_errors("--image"):
        sizes = [image_size(file) for file in files]
    check_sizes(f, sizes)
    cache.cache_compilations(f.cache_dir)
    enlarge = enlarger(f)
    for folder in {path.parent for path in paths}:
        make_folder(folder)
    recorded = ("upscale", "upscaler", "upscale_tile", "dtype")
    shared = {name: f[name].value for name in recorded if f[name].value != OPTIONS[name].default}
    writer = Writer(f.overwrite)
    with progress_bar("enlarging", len(files)) as advance:
        for file, path in zip(files, paths, strict=True):
            with file_errors("--image"):
                image = read_with_alpha(file)
            writer.png(path, enlarge(image), {"image": str(file), **shared})
            advance(1)
