"""Draw pictures from text.

    python sample.py --prompt "a castle"
    python sample.py --prompt "a castle" --prompt "a dog" --num_images 4 --grid --output pictures/
    python sample.py --prompt "a castle at night" --image castle.png --strength 0.6 --output night.png

Written paths go to stdout, one a line; progress, warnings and errors to stderr. Pictures are counted over all prompts,
and picture i is drawn from the seed --seed + i. Its PNG holds the flags that draw it again, its own seed among them:
`jaxdiff.io.images.read_metadata` reads them. Exit code: 0; 2 for flags that cannot be right; 130 after
Ctrl-C; 1 for any other failure.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import jaxdiff
from jaxdiff.cli import errors
from jaxdiff.cli.errors import Failure, UsageError
from jaxdiff.cli.outputs import check_folder, make_folder, output_files
from jaxdiff.cli.requests import Picture, arguments, batch_size, columns, how_many, lines, plan
from jaxdiff.cli.sample_flags import check_model, parse, weighted
from jaxdiff.io import images

FRAMES = 8  # of a --preview
FRAME_SECONDS = 0.1  # of an --interpolate film


def settle(f: flags.FlagValues, model: jaxdiff.Model, count: int) -> None:
    """Give every flag left open the value that the model and the machine decide; raise UsageError if one cannot be."""
    import jax

    from jaxdiff.diffusion.times import default_scheduler
    from jaxdiff.sampling.resolve import latent_shape, settle_strength, start_of

    check_model(f, model)
    try:
        f["scheduler"].value = f.scheduler or default_scheduler(model.scheduler)
        if f.guidance_scale is None:
            f["guidance_scale"].value = model.options.guidance_scale
        jaxdiff.get_scheduler(f.scheduler, model.scheduler)
        mask = f.mask or f.outpaint
        f["strength"].value = settle_strength(model, f.image, mask, f.strength)
        task = f.image, mask, f.strength, f.hires, f.hires_strength
        start = start_of(model, f.steps, f.scheduler, f.spacing, *task)
        jaxdiff.time_grid(model.scheduler, f.steps, f.scheduler, f.spacing, strength=start.part)
        latent = latent_shape(model, *size(f, model))
    except images.ImageError:
        raise
    except ValueError as e:
        name = str(e).split()[0]
        raise UsageError(f"--{e}" if name in f else str(e)) from None
    f["height"].value, f["width"].value = (side * model.vae.config.factor for side in latent[:2])
    f["batch_size"].value = f.batch_size or batch_size(count, jax.local_device_count())


def size(f: flags.FlagValues, model: jaxdiff.Model) -> tuple[int | None, int | None]:
    """Height and width, as far as the flags or a picture that is enlarged or extended say them."""
    from jaxdiff.sampling.resolve import settle_size

    if f.image is None or not (f.outpaint or model.family == "upscaler"):
        return f.height, f.width
    image = images.read_image(f.image)
    if not f.outpaint:
        return settle_size(model, f.height, f.width, None, image)
    left, top, right, bottom = f.outpaint
    sides, factor = (image.shape[0] + top + bottom, image.shape[1] + left + right), model.vae.config.factor
    height, width = (side // factor * factor for side in sides)
    return f.height or height, f.width or width


def load(f: flags.FlagValues, opened: tuple[jaxdiff.Model, Any] | None) -> tuple[jaxdiff.Model, Any]:
    """The model (`opened` already, or to be) with all that is laid onto it, and its parameters wherever is drawn."""
    import jax

    from jaxdiff.io.controlnet import load_controlnet
    from jaxdiff.io.modules import load_tiny_vae

    params: Any
    model, params = opened or jaxdiff.load(f.model, dtype=f.dtype, prediction_type=f.prediction_type)
    if f.vae:
        model, params = jaxdiff.load_vae(model, params, f.vae)
    for given in f.embedding:
        model, params = jaxdiff.load_textual_inversion(model, params, *named(given))
    if f.lora:
        files = [weighted(given) for given in f.lora]
        params = jaxdiff.load_lora(model, params, [path for path, _ in files], [scale for _, scale in files])
    if f.controlnet:
        nets = [load_controlnet(path, dtype=f.dtype) for path in f.controlnet]
        model, params = jaxdiff.with_controlnets(model, params, *nets)
    if f.preview_vae:
        tiny, tree = load_tiny_vae(f.preview_vae, dtype=f.dtype)
        model, params = dataclasses.replace(model, tiny_vae=tiny), params | {"tiny_vae": tree}
    return model, jaxdiff.replicate(params, jax.local_devices()[: f.batch_size])


def named(given: str) -> tuple[str, str | None]:
    """token=path as a path and a token; None where there is none. A path may have an = too."""
    token, equals, path = given.partition("=")
    return (path, token) if equals and "/" not in token and not Path(given).exists() else (given, None)


def sources(f: flags.FlagValues, model: jaxdiff.Model) -> dict[str, Any]:
    """The pictures that `generate` starts from or follows, at the size that it draws."""
    from jaxdiff.io.edges import canny

    found: dict[str, Any] = {}
    if f.outpaint:
        extended, mask = images.extend(images.read_image(f.image), *f.outpaint)
        found |= {"image": images.fit(extended, f.height, f.width), "mask": images.fit_mask(mask, f.height, f.width)}
    elif f.image:
        shrink = model.vae.config.factor if model.family == "upscaler" else 1
        found["image"] = fitted("--image", f.image, f.height // shrink, f.width // shrink)
    if f.mask:
        sizes = [images.read_image(path).shape[:2] for path in (f.image, f.mask)]
        if sizes[0] != sizes[1]:
            shown = " and ".join(f"{width} x {height}" for height, width in sizes)
            raise Failure(f"--image and --mask are {shown}: make the mask as large as the picture.")
        found["mask"] = fitted("--mask", f.mask, f.height, f.width).mean(-1) / 255
    if f.control_image:
        given = [fitted("--control_image", path, f.height, f.width) for path in f.control_image]
        found["control_images"] = [canny(x) for x in given] if f.control_edges else given
        found["controlnet_scale"] = f.controlnet_scale or 1.0
    return found


def fitted(flag: str, path: str, height: int, width: int) -> np.ndarray:
    """The picture of a flag at the size drawn, with a warning if that cuts or resizes it."""
    image = images.read_image(path)
    if image.shape[:2] != (height, width):
        note = "%s %s is %d x %d: cut at its centre and resized to %d x %d."
        logging.warning(note, flag, path, image.shape[1], image.shape[0], width, height)
    return images.fit(image, height, width)


def draw(model: jaxdiff.Model, params: Any, pictures: list[Picture], given: dict[str, Any]) -> Iterator[list[tuple]]:
    """Batch by batch: [(picture [H, W, 3], frames [F, H, W, 3] or None), …]."""
    size, frames = pictures[0]["batch_size"], min(FRAMES, pictures[0]["steps"]) if pictures[0].get("preview") else 0
    for i in range(0, len(pictures), size):
        batch = pictures[i : i + size]
        filled = batch + batch[-1:] * (size - len(batch))
        drawn = jaxdiff.generate(model, params, **arguments(filled), **given, frames=frames)
        yield list(zip(*drawn if frames else (drawn, [None] * size), strict=True))[: len(batch)]


def with_progress(batches: Iterator[list[tuple]], total: int) -> Iterator[tuple]:
    """The pictures of all batches, with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    # Paths printed meanwhile pass through the bar's console only if stdout is a terminal, else they belong to a pipe.
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    ) as bar:
        task, start, done = bar.add_task("compiling and drawing", total=total, speed=""), time.monotonic(), 0
        for batch in batches:
            done += len(batch)
            speed = f"{done / (time.monotonic() - start):.2f} pictures/s"
            bar.update(task, completed=done, description="drawing", speed=speed)
            yield from batch


def run(f: flags.FlagValues) -> None:
    """Draw what the flags say. Whatever can be wrong is found in order of its cost."""
    from jaxdiff.io import cache, pretrained

    check_folder(Path(f.output.split("{")[0] or ".").parent)
    given = lines(f)
    path, opened = pretrained.find(f.model), None
    if path.is_dir():
        model = pretrained.load_model(
            path, f.dtype, prediction_type=f.prediction_type
        )  # configs alone: weights are slow to read
    else:  # of a one-file checkpoint the tensors tell the configs
        opened = jaxdiff.load(path, dtype=f.dtype, prediction_type=f.prediction_type)
        model = opened[0]
    settle(f, model, how_many(f, given))
    pictures = plan(f, given)
    files = output_files(f, pictures)
    check_folder(files.pictures[0].parent)
    started = sources(f, model)
    jaxdiff.tokenize(model, [p["prompt"] for p in pictures])  # warns of what is cut before anything is drawn
    cache.cache_compilations(f.cache_dir)
    model, params = load(f, opened)
    for folder in {p.parent for p in files.pictures}:
        make_folder(folder)

    def write(path: Path, picture: np.ndarray, metadata: Any) -> None:
        images.write_png(path, picture, metadata)
        print(path, flush=True)

    kept: list[np.ndarray] = []
    drawn = with_progress(draw(model, params, pictures, started), len(pictures))
    for i, (metadata, (picture, frames)) in enumerate(zip(pictures, drawn, strict=True)):
        write(files.pictures[i], picture, metadata)
        if f.preview:
            write(files.previews[i], images.strip(frames), metadata)
        if f.grid or f.interpolate:
            kept.append(picture)
    if f.grid:
        write(files.sheet, images.grid(kept, columns(f, len(kept))), pictures)
    if f.interpolate:
        images.write_gif(files.film, kept, FRAME_SECONDS)
        print(files.film, flush=True)


def command(argv: list[str]) -> None:
    f = parse(argv)
    if f.help:
        print(__doc__, f.get_help(), sep="\n")
    else:
        run(f)


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default this program's; returns the exit code."""
    argv = sys.argv if argv is None else argv
    logging.basicConfig(format="sample.py: %(levelname)s: %(message)s")
    return errors.run(
        "sample.py",
        argv,
        command,
        smaller="lower --batch_size, --height or --width, give --tile, or use --dtype=bfloat16",
        stopped="the pictures listed so far are whole",
    )
