"""Draw pictures from text.

    python sample.py --prompt "a castle"
    python sample.py --prompt "a castle" --prompt "a red dragon" --num_images 4 --grid --output pictures/
    python sample.py --prompt "a castle at night" --image castle.png --strength 0.6 --output night.png

Written paths go to stdout, one a line; progress, warnings and errors to stderr. Pictures are counted over all prompts,
and picture i is drawn from the seed --seed + i. Its PNG holds the flags that draw it again, its own seed among them:
`jaxdiff.io.images.read_metadata` reads them. Exit code: 0; 2 for flags that cannot be right; 1 for any other failure.
"""

import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

FRAMES = 8  # of a --preview
SEEDS = 2**32
OPTIONS = ("steps", "guidance_scale", "scheduler", "spacing", "height", "width", "strength")  # as `generate` has them
REDRAW = ("negative_prompt", *OPTIONS, "image", "model", "dtype", "batch_size", "preview")
NOT_PNG = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class UsageError(Exception):
    """Flags that cannot be right: one sentence naming the flag and the mend."""


class Failure(Exception):
    """What went wrong with flags that could be right, in one sentence."""


def define_flags() -> flags.FlagValues:
    """The flags, apart from absl's global ones, so that any program may import this module."""
    f = flags.FlagValues()
    flags.DEFINE_string("model", "icons", "A diffusers folder, or the name of a bundled model.", f)
    flags.DEFINE_multi_string("prompt", [], "What to draw; give the flag again for more prompts.", f)
    flags.DEFINE_string("negative_prompt", None, "What to steer away from.", f)
    flags.DEFINE_integer("seed", 0, "Seed of the first picture; the next ones count up.", 0, SEEDS - 1, f)
    flags.DEFINE_integer("steps", 25, "Number of denoising steps.", 1, flag_values=f)
    flags.DEFINE_float("guidance_scale", 7.5, "Weight of the prompt; 1 or less turns guidance off.", flag_values=f)
    flags.DEFINE_string("scheduler", None, "ddim, euler, dpmpp_2m, …; default: what the model's config says.", f)
    flags.DEFINE_string(
        "spacing", None, "Spacing of the steps: leading, trailing, linspace, karras; default: as above.", f
    )
    flags.DEFINE_integer("height", None, "Pixels; default: the model's own.", 1, flag_values=f)
    flags.DEFINE_integer("width", None, "Pixels; default: the model's own.", 1, flag_values=f)
    flags.DEFINE_integer("num_images", 1, "Pictures of each prompt.", 1, flag_values=f)
    flags.DEFINE_integer(
        "batch_size", None, "Pictures drawn at once; the last batch is filled up, so that one compiled program draws "
        "all. Default: batches of equal size, at most 4 pictures a device.", 1, flag_values=f,
    )  # fmt: skip
    flags.DEFINE_string(
        "output", "outputs", "A .png file (castle.png; several are numbered: castle-000.png …), a folder (files are "
        "named by prompt and seed), or a pattern with {prompt}, {seed} and {index}: 'out/{prompt}-{index:03d}.png'.", f,
    )  # fmt: skip
    flags.DEFINE_bool(
        "grid", False, "Also write all pictures on one sheet (…grid.png): one row a prompt; near to a square with one "
        "picture a prompt.", f,
    )  # fmt: skip
    flags.DEFINE_bool("preview", False, "Also write how each picture came about, as a strip (…-preview.png).", f)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Type to compute in.", f)
    flags.DEFINE_string("image", None, "Picture to start from; cut at its centre and resized to height and width.", f)
    flags.DEFINE_float(
        "strength", None, "With --image: how much of it is redrawn, in (0, 1]; default 0.6.", flag_values=f
    )
    flags.DEFINE_string("cache_dir", None, "Folder of compiled programs; default: jaxdiff in your cache folder.", f)
    flags.DEFINE_bool("verbose", False, "Show the traceback of an error.", f)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    return f


def parse(argv: list[str]) -> flags.FlagValues:
    """Flags of a command line, checked as far as that goes without the model."""
    f = define_flags()
    try:
        rest = f(argv)[1:]
    except flags.Error as e:
        raise UsageError(f"{e}; --help shows all flags.") from None
    if f.help:
        return f
    if rest:
        raise UsageError(f"{rest[0]!r} belongs to no flag: put each prompt in quotes after its own --prompt.")
    if not f.prompt:
        raise UsageError('--prompt is missing: say what to draw, such as --prompt "a castle".')
    if not math.isfinite(f.guidance_scale):
        raise UsageError(f"--guidance_scale {f.guidance_scale} must be a finite number, such as 7.5.")
    if f.strength is not None and f.image is None:
        raise UsageError("--strength goes with --image: give the picture to start from, or leave --strength out.")
    if f.image is not None:
        f["strength"].value = 0.6 if f.strength is None else f.strength
        if not 0 < f.strength <= 1:
            raise UsageError(f"--strength {f.strength} must be above 0 and at most 1.")
        if int(f.steps * f.strength) < 1:
            raise UsageError(f"--strength {f.strength} leaves none of --steps {f.steps}: raise one of the two.")
    return f


def name_of(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:50].strip("-") or "picture"


def output_paths(output: str, pictures: list[dict[str, Any]]) -> tuple[list[Path], Path]:
    """Where each picture goes, and the sheet of all."""
    path = Path(output)
    if "{" in output:
        try:
            names = [
                output.format(index=i, seed=p["seed"], prompt=name_of(p["prompt"])) for i, p in enumerate(pictures)
            ]
        except (LookupError, ValueError, AttributeError):
            raise UsageError(f"--output {output} may name {{prompt}}, {{seed}} and {{index}} only.") from None
        if len(set(names)) < len(names):
            raise UsageError(f"--output {output} gives several pictures one name: add {{index}} to it.")
        if not output.lower().endswith(".png"):
            raise UsageError(f"--output {output} is a pattern, and pictures are PNG: end it in .png.")
        paths = [Path(name) for name in names]
        return paths, paths[0].parent / "grid.png"
    if path.suffix.lower() in NOT_PNG:
        raise UsageError(f"--output {output}: pictures are written as PNG: name a .png file or a folder.")
    if path.suffix.lower() != ".png" or path.is_dir():
        return [path / f"{name_of(p['prompt'])}-{p['seed']:03d}.png" for p in pictures], path / "grid.png"
    sheet = path.with_name(f"{path.stem}-grid.png")
    if len(pictures) == 1:
        return [path], sheet
    return [path.with_name(f"{path.stem}-{i:03d}.png") for i in range(len(pictures))], sheet


def check_folder(folder: Path) -> None:
    """Raise Failure where pictures plainly cannot be written, without making anything."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise Failure(f"--output: {existing} is a file, not a folder: choose another place.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Failure(f"--output: the folder {existing} is not writable: choose another place.")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise Failure(f"--output: {folder} cannot be written to ({e.strerror or e}): choose another place.") from None


def settle(f: flags.FlagValues, model) -> None:
    """Give every flag left open the value that the model and the machine decide; raise UsageError if one cannot be."""
    import jax

    import jaxdiff
    from jaxdiff.diffusion.times import default_scheduler
    from jaxdiff.generate import latent_shape

    try:
        f["scheduler"].value = f.scheduler or default_scheduler(model.scheduler)
        jaxdiff.get_scheduler(f.scheduler, model.scheduler)
        jaxdiff.time_grid(model.scheduler, f.steps, f.scheduler, f.spacing)
        latent = latent_shape(model, f.height, f.width)
    except ValueError as e:
        raise UsageError(str(e)) from None
    f["height"].value, f["width"].value = (side * model.vae.config.factor for side in latent[:2])
    if f.batch_size is None:
        total = len(f.prompt) * f.num_images
        f["batch_size"].value = math.ceil(total / math.ceil(total / (4 * jax.local_device_count())))


def plan(f: flags.FlagValues) -> list[dict[str, Any]]:
    """The flags that draw each picture again, to the byte.

    The batch size is one of them, and so is the preview: other shapes and other programs may round otherwise.
    """
    shared = {name: getattr(f, name) for name in REDRAW}
    shared = {name: value for name, value in shared.items() if value not in (None, False)}
    prompts = [p for p in f.prompt for _ in range(f.num_images)]
    return [{"prompt": p, "seed": (f.seed + i) % SEEDS, **shared} for i, p in enumerate(prompts)]


def draw(model, params, pictures: list[dict[str, Any]], image) -> Iterator[list[tuple]]:
    """Batch by batch: [(picture [H, W, 3], frames [F, H, W, 3] or None), …]."""
    import jaxdiff

    shared, size = pictures[0], pictures[0]["batch_size"]
    frames = FRAMES if shared.get("preview") else 0
    options = {name: shared[name] for name in OPTIONS if name in shared}
    for i in range(0, len(pictures), size):
        batch = pictures[i : i + size]
        filled = batch + batch[-1:] * (size - len(batch))
        prompts, seeds = [p["prompt"] for p in filled], [p["seed"] for p in filled]
        drawn = jaxdiff.generate(
            model, params, prompts, shared.get("negative_prompt"), seed=seeds, image=image, frames=frames, **options
        )
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


def starting_image(path: str, height: int, width: int):
    """The picture of --image at the size drawn."""
    from jaxdiff.io import images

    image = images.read_image(path)
    if image.shape[:2] != (height, width):
        note = "--image %s is %d x %d: cut at its centre and resized to %d x %d."
        logging.warning(note, path, image.shape[1], image.shape[0], width, height)
    return images.fit(image, height, width)


def load(f: flags.FlagValues):
    """The model, and its parameters on every device that draws."""
    import jax

    import jaxdiff
    from jaxdiff import parallel

    model, params = jaxdiff.load(f.model, dtype=f.dtype)
    devices = jax.local_devices()[: f.batch_size]
    return model, parallel.place(params, parallel.replicated(parallel.mesh(devices=devices)))


def run(f: flags.FlagValues) -> None:
    """Draw what the flags say. Whatever can be wrong is found in order of its cost."""
    check_folder(Path(f.output.split("{")[0] or ".").parent)
    import jaxdiff
    from jaxdiff.io import cache, images, pretrained

    model = pretrained.load_model(pretrained.find(f.model), f.dtype)  # configs alone: weights are slow to read
    settle(f, model)
    pictures = plan(f)
    paths, sheet = output_paths(f.output, pictures)
    check_folder(paths[0].parent)
    image = None if f.image is None else starting_image(f.image, f.height, f.width)
    jaxdiff.tokenize(model, f.prompt)  # warns of what is cut before anything is drawn
    cache.cache_compilations(f.cache_dir)
    model, params = load(f)
    for folder in {p.parent for p in paths}:
        make_folder(folder)

    def write(path: Path, picture, metadata) -> None:
        images.write_png(path, picture, metadata)
        print(path, flush=True)

    kept: list = []
    drawn = with_progress(draw(model, params, pictures, image), len(paths))
    for path, metadata, (picture, frames) in zip(paths, pictures, drawn, strict=True):
        write(path, picture, metadata)
        if f.preview:
            write(path.with_name(f"{path.stem}-preview.png"), images.strip(frames), metadata)
        if f.grid:
            kept.append(picture)
    if f.grid:
        columns = f.num_images if f.num_images > 1 else math.ceil(math.sqrt(len(kept)))
        write(sheet, images.grid(kept, columns), pictures)


def message(error: BaseException) -> str:
    """An error in one sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return "Memory is too small: lower --batch_size, --height or --width, or use --dtype=bfloat16."
    if isinstance(error, UsageError | Failure | ValueError):
        return text
    return f"{type(error).__name__}: {text}; --verbose shows where."


def main(argv: list[str]) -> int:
    """Run a command line; returns the exit code."""
    logging.basicConfig(format="sample.py: %(levelname)s: %(message)s")
    verbose = any(a.lstrip("-") == "verbose" for a in argv[1:])
    try:
        f = parse(argv)
        if f.help:
            print(__doc__, f.get_help(), sep="\n")
        else:
            run(f)
        return 0
    except KeyboardInterrupt:
        print("sample.py: stopped; the pictures listed so far are whole.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if verbose:
            logging.exception("traceback")
        print(f"sample.py: error: {message(e)}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
