"""Draw images from text.

    python sample.py --prompt "a castle"
    python sample.py --prompt "a castle" --prompt "a dog" --num_images 4 --grid --output drawn/
    python sample.py --prompt "a castle" --image castle.png --strength 0.6 --output again.png
    python sample.py --prompt "a castle" --upscale 4
    python sample.py --image small.png --upscale 4
    python sample.py --from_png castle.png --steps 50 --output finer.png

Written paths go to stdout, one a line; progress, warnings and errors to stderr. Images are counted over all prompts,
and image i is drawn from the seed --seed + i. Its PNG holds the flags that draw it again, its own seed among them, for
--from_png and `jaxdiff.io.images.read_metadata`. Exit code: 0; 2 for flags that cannot be right; 130 after Ctrl-C; 1
for any other failure.
"""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

import jaxdiff
from jaxdiff import parallel
from jaxdiff.cli import errors, hosts
from jaxdiff.cli.adapters import (
    Adapters,
    batch_slices,
    prompt_loras,
    read_adapters,
    read_prompt_loras,
    without_tags,
)
from jaxdiff.cli.errors import UsageError, file_errors
from jaxdiff.cli.flags import check_files, check_model, flag_errors, parse, parse_lora
from jaxdiff.cli.loading import encode_batches, load, loaded_part
from jaxdiff.cli.options import OPTIONS
from jaxdiff.cli.outputs import Files, Writer, animation_path, check_folder, make_folder, output_files, preview_path
from jaxdiff.cli.progress import progress_bar
from jaxdiff.cli.requests import (
    ImageRequest,
    batch_arguments,
    batch_size,
    count_images,
    image_requests,
    prompt_lines,
    sheet_columns,
)
from jaxdiff.cli.upscale import Enlarge, check_sizes, describe_upscaler, enlarge_files, enlarger
from jaxdiff.config import ControlNetConfig
from jaxdiff.data.images import BLACK, MAX_PIXELS, WHITE
from jaxdiff.io import cache, diffusers_folder, images, model_paths, pretrained, programs
from jaxdiff.io.configs import read_config
from jaxdiff.io.controlnet import check_controlnet
from jaxdiff.io.edges import canny
from jaxdiff.io.lora import Weighted, bundled_words, merge_named
from jaxdiff.io.modules import CONFIG
from jaxdiff.io.vae import check_tiny_vae, check_vae, described_vae
from jaxdiff.models.controlnet import ControlNet
from jaxdiff.sampling.checks import check_memory, min_memory
from jaxdiff.sampling.generate import Drawn, draw
from jaxdiff.sampling.resolve import Request, Settings, resolve_images, resolve_settings
from jaxdiff.text.prompt_files import PromptLine

FRAMES = 8  # of a --preview
FRAME_SECONDS = 0.1  # of an --interpolate animation
PREVIEW_SECONDS, LAST_SECONDS = 0.3, 2.0  # of a frame of a --preview_animation, and of its last one

Reader = Callable[..., np.ndarray]  # (path, background colour) -> image uint8 [H, W, 3]


def device_mesh(f: flags.FlagValues) -> Mesh | None:
    """The mesh of this process's devices for --fsdp and --tensor; None if both are 1. Raises UsageError."""
    if f.fsdp == f.tensor == 1:
        return None
    try:
        return parallel.mesh(f.fsdp, f.tensor, jax.local_devices())
    except ValueError as e:
        raise UsageError(f"--{e}") from None


def image_groups(f: flags.FlagValues, lines: list[PromptLine]) -> list[int]:
    """Sizes of the runs of images with the same LoRAs: only these can share a batch. Raises UsageError."""
    if f.lora_dir is None:
        return [count_images(f, lines)]
    check_files(f)
    lora_choices = prompt_loras(f, image_requests(f, lines))
    return [end - start for start, end in batch_slices(lora_choices, len(lora_choices))]


def resolve(f: flags.FlagValues, model: jaxdiff.Model, groups: list[int], read: Reader) -> Settings:
    """The settings that all images share; open flags are set to the values chosen. Raises UsageError.

    Args:
        groups: see `image_groups`.
    """
    check_model(f, model)
    arguments: dict[str, Any] = {name: f[name].value for name, option in OPTIONS.items() if option.part == "settings"}
    arguments |= {"image": f.image, "mask": f.mask or f.outpaint, "guidance_scale": f.guidance_scale}
    if f.outpaint or model.family == "upscaler":
        check_files(f)
    if f.outpaint:
        arguments |= outpainted_size(f, model, read(f.image).shape)
    elif f.image and model.family == "upscaler":  # its size is that of the image, enlarged
        arguments["image"] = read(f.image)
    try:
        with flag_errors():
            frames = min(FRAMES, f.steps or model.options.steps) if f.preview else 0
            settings = resolve_settings(model, frames=frames, **arguments)
    except ValueError as e:  # the model's scheduler_config.json
        raise UsageError(str(e)) from None
    stepwise = () if model.is_gan else ("scheduler", "steps", "guidance_scale", "strength")
    for name in (*stepwise, "height", "width"):
        f[name].value = getattr(settings, name)
    if f.pag_scale is None and model.options.pag_scale:
        f["pag_scale"].value = model.options.pag_scale
    devices, size = jax.local_device_count() // f.tensor, (settings.height, settings.width, settings.tile)
    if f.batch_size is None:
        max_per_device = int(min(4, max(1, parallel.device_memory() / min_memory(model, *size))))
        per_process = [math.ceil(count / jax.process_count()) for count in groups]
        f["batch_size"].value = batch_size(per_process, devices, max_per_device)
    with flag_errors():
        check_memory(model, *size, count=math.ceil(f.batch_size / devices))
    return settings


def outpainted_size(f: flags.FlagValues, model: jaxdiff.Model, shape: tuple[int, ...]) -> dict[str, int]:
    """Height and width of the flags, else of the image [H, W, 3] extended, rounded down to what can be drawn."""
    left, top, right, bottom = f.outpaint
    sides = shape[0] + top + bottom, shape[1] + left + right
    if sides[0] * sides[1] > MAX_PIXELS:
        raise UsageError(f"--outpaint makes {sides[1]} x {sides[0]} pixels, more than {MAX_PIXELS} in all: add fewer.")
    height, width = (side - side % model.multiple for side in sides)
    return {"height": f.height or height, "width": f.width or width}


def describe_model(f: flags.FlagValues, path: Path) -> jaxdiff.Model:
    """The model at a path with --transformer and --vae, from configs and file headers, without reading weights."""
    with file_errors("--model"):
        options: dict[str, Any] = {"prediction_type": f.prediction_type, "without_vae": f.vae is not None}
        model, own_vae = pretrained.described(path, f.dtype, **options)
    if f.transformer is not None and Path(f.transformer).exists():
        with file_errors("--transformer"):
            model = diffusers_folder.with_transformer(model, path, Path(f.transformer))
    if f.vae is None or not Path(f.vae).exists():  # `check_files` reports it
        return model
    with file_errors("--vae"):
        return described_vae(model, f.vae, own=own_vae)[0]


def check_networks(f: flags.FlagValues) -> None:
    """Raise UsageError if a file of --vae, --preview_vae or --controlnet holds something else; reads no weights."""
    for name, check in {"vae": check_vae, "preview_vae": check_tiny_vae, "controlnet": check_controlnet}.items():
        value: Any = f[name].value
        with file_errors(f"--{name}"):
            for path in value if isinstance(value, list) else [value]:
                if path is not None and Path(path).exists():  # else `check_files` reports it
                    check(path)


def with_controlnets(model: jaxdiff.Model, path: Path, adapters: Adapters) -> jaxdiff.Model:
    """The model with its ControlNets: those of the flags, else its folder's own."""
    controlnets = [net for net, _ in adapters.controlnets]
    if not controlnets and path.is_dir():
        for name in diffusers_folder.controlnets(path):
            config: Any = read_config(path / name / CONFIG, ControlNetConfig)
            controlnets.append(ControlNet(config))
    return dataclasses.replace(model, controlnets=tuple(controlnets))


def input_images(f: flags.FlagValues, model: jaxdiff.Model, read: Reader) -> dict[str, Any]:
    """The input images, resized: arguments of `resolve_images`. Raises UsageError."""
    inputs: dict[str, Any] = {}
    if f.outpaint:
        extended, mask = images.extend(read(f.image), *f.outpaint)
        inputs |= {"image": images.fit(extended, f.height, f.width), "mask": images.fit_mask(mask, f.height, f.width)}
    elif f.image:
        shrink = model.vae.config.factor if model.family == "upscaler" else 1
        inputs["image"] = fit_image("--image", f.image, f.height // shrink, f.width // shrink, read)
    if f.mask:
        # Transparent areas become black, so that they are kept.
        mask = read(f.mask, BLACK)
        sizes = [x.shape[:2] for x in (read(f.image), mask)]
        if sizes[0] != sizes[1]:
            sizes_text = " and ".join(f"{width} x {height}" for height, width in sizes)
            raise UsageError(f"--image and --mask are {sizes_text}: make the mask as large as the image.")
        inputs["mask"] = fit_image("--mask", f.mask, f.height, f.width, lambda path: mask).mean(-1) >= 127.5
    if f.control_image:
        # Poses, depths and edges are light on black; --control_edges finds the edges of other images.
        read_control = read if f.control_edges else lambda path: read(path, BLACK)
        hints = [fit_image("--control_image", path, f.height, f.width, read_control) for path in f.control_image]
        inputs["control_images"] = [canny(x) for x in hints] if f.control_edges else hints
        inputs["controlnet_scale"] = f.controlnet_scale or 1.0
    return inputs


def reader(f: flags.FlagValues) -> Reader:
    """A function that reads each image of the flags once; errors name the flag."""

    @functools.cache
    def read(path: str, background: tuple[int, int, int] = WHITE) -> np.ndarray:
        flag = "image" if path == f.image else "mask" if path == f.mask else "control_image"
        with file_errors(f"--{flag}"):
            return images.read_image(path, background)

    return read


def fit_image(flag: str, path: str, height: int, width: int, read: Reader) -> np.ndarray:
    """The image of a flag, cropped and resized to height and width, with a warning if that changes it."""
    image = read(path)
    if image.shape[:2] != (height, width):
        note = "%s %s is %d x %d: cut at its centre and resized to %d x %d."
        logging.warning(note, flag, path, image.shape[1], image.shape[0], width, height)
    return images.fit(image, height, width)


def resolve_batches(
    model: jaxdiff.Model,
    settings: Settings,
    requests: list[ImageRequest],
    inputs: dict[str, Any],
    slices: Sequence[tuple[int, int]],
    size: int,
) -> list[Request]:
    """The inputs of each batch, padded to `size`. Warns of prompts that are cut; raises UsageError."""
    resolved = []
    for start, end in slices:
        batch = requests[start:end]
        padded = batch + batch[-1:] * (size - len(batch))
        with file_errors("--model"), flag_errors():  # the tokenizers are opened here
            resolved.append(resolve_images(model, settings, **batch_arguments(padded), **inputs))
    return resolved


def with_progress(batches: Iterator[list[tuple]], total: int) -> Iterator[tuple]:
    """The images of all batches, with a progress bar."""
    with progress_bar("compiling and drawing", total) as advance:
        for batch in batches:
            advance(len(batch), "drawing")
            yield from batch


def draw_batches(
    model: jaxdiff.Model, params_of: Callable[[int], Any], requests: list[Request], slices: Sequence[tuple[int, int]]
) -> Iterator[list[tuple]]:
    """Batch by batch: [(image [H, W, 3], layers of frames or None), …], without padding.

    Args:
        params_of: index of an image -> the parameters to draw it with.
    """
    for request, (start, end) in zip(requests, slices, strict=True):
        output = draw(model, params_of(start), request, lookup=programs.lookup)
        yield [(output.images[i], frame_layers(output, i)) for i in range(end - start)]


def frame_layers(output: Drawn, i: int) -> list[list[np.ndarray]] | None:
    """The frames of an image, a list for each layer: with `hires` those of the first stage, then of the second."""
    if output.frames is None:
        return None
    frames = list(output.frames[i])
    if output.small is None or output.enlarged is None:
        return [frames]
    return [list(output.small[i]), [output.enlarged[i], *frames]]


def run(f: flags.FlagValues) -> None:
    """Draw what the flags say. Cheap checks come first."""
    check_folder(Path(f.output.split("{")[0] or ".").parent)
    if not (f.prompt or f.prompts_file):
        return enlarge_files(f)
    lines = prompt_lines(f)
    check_networks(f)
    with hosts.independent(f):
        draw_lines(f, lines)


def draw_lines(f: flags.FlagValues, lines: list[PromptLine]) -> None:
    """Draw this process's images of these prompts, and write them."""
    mesh = device_mesh(f)
    with file_errors("--model"):
        path = model_paths.find(f.model)
    cache.cache_compilations(f.cache_dir)
    model = dataclasses.replace(describe_model(f, path), upscaler=describe_upscaler(f) if f.hires else None)
    read = reader(f)
    settings = resolve(f, model, image_groups(f, lines), read)
    check_sizes(f, [(settings.height, settings.width)])
    requests = image_requests(f, lines)
    files = output_files(f, requests)
    check_folder(files.images[0].parent)
    check_files(f)
    inputs = input_images(f, model, read)
    enlarge = enlarger(f)
    adapters, lora_choices = read_adapters(f, model, mesh), prompt_loras(f, requests)
    loras, all_slices = read_prompt_loras(model, lora_choices), list(batch_slices(lora_choices, f.batch_size))
    slices = hosts.local_share(all_slices)
    untagged = [without_tags(f, request) for request in requests]
    plan = functools.partial(
        resolve_batches, settings=settings, requests=untagged, inputs=inputs, slices=slices, size=f.batch_size
    )
    lora_files: list[str | Path] = [*(parse_lora(value)[0] for value in f.lora), *loras]
    # Embeddings add tokens to the tokenizer, so prompts are tokenized after they are loaded.
    adds_tokens = f.embedding or any(bundled_words(model, file) for file in lora_files)
    batches = None if adds_tokens else plan(with_controlnets(model, path, adapters))
    networks = list(model.modules)
    if f.offload == "text":
        texts = [name for name in networks if name.startswith("text_encoder")]
        batches = encode_batches(
            f, load(f, path, adapters, lora_files, mesh, texts), batches, plan, loras, lora_choices, slices
        )
        networks = [name for name in networks if name not in texts]
    model, params = load(f, path, adapters, lora_files, mesh, networks if f.offload else None)
    del adapters
    batches = batches or plan(model)
    loras = {file: loaded_part(lora, params) for file, lora in loras.items()}
    if len(set(lora_choices)) == 1:  # one set of LoRAs: no need to keep the unmerged parameters
        params, lora_choices = merge_named(params, loras, lora_choices[0]), [()] * len(lora_choices)

    def place(params: Any) -> Any:
        devices = jax.local_devices()[: f.batch_size]
        return jaxdiff.replicate(params, devices) if mesh is None else jaxdiff.shard(params, mesh)

    params = place(params)
    merged: dict[Weighted, Any] = {}

    def params_with(choice: Weighted) -> Any:
        if choice not in merged:
            merged.clear()  # first, to hold one set of merged parameters at a time
            merged[choice] = place(merge_named(params, loras, choice))
        return merged[choice]

    drawn = draw_batches(model, lambda i: params_with(lora_choices[i]), batches, slices)
    write_drawn(f, files, requests, drawn, enlarge, all_slices)


def write_drawn(
    f: flags.FlagValues,
    files: Files,
    requests: list[ImageRequest],
    batches: Iterator[list[tuple]],
    enlarge: Enlarge,
    slices: Sequence[tuple[int, int]],
) -> None:
    """Write this process's images as they are drawn, then, on the first process, the sheet and the animation of all.

    Args:
        batches: this process's, as `draw_batches` yields them.
        slices: the batches of all processes.
    """
    for folder in {p.parent for p in files.images}:
        make_folder(folder)
    writer = Writer(f.overwrite)
    sheet_images: list[np.ndarray] = []
    numbers = [i for start, end in hosts.local_share(slices) for i in range(start, end)]
    for i, (image, layers) in zip(numbers, with_progress(batches, len(numbers)), strict=True):
        image = enlarge(image)
        path = writer.png(files.images[i], image, requests[i])
        if layers is not None:
            layers = [*layers, [image]] if f.upscale else layers
            preview = writer.png(preview_path(path), images.layers(layers), requests[i])
            if f.preview_animation:
                frames = [frame for layer in layers for frame in layer]
                writer.webp(animation_path(preview), frames, PREVIEW_SECONDS, LAST_SECONDS)
        if f.grid or f.interpolate:
            sheet_images.append(image)
    hosts.wait_for_all()
    if f.grid or f.interpolate:
        sheet_images = hosts.gather_images(sheet_images, slices)
    if jax.process_index():  # the first process writes the sheet and the animation
        return
    if f.grid:
        writer.png(files.sheet, images.grid(sheet_images, sheet_columns(f, len(sheet_images))), requests)
    if f.interpolate:
        writer.gif(files.animation, sheet_images, FRAME_SECONDS)


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default this program's; returns the exit code."""
    argv = sys.argv if argv is None else argv
    return errors.main(
        Path(argv[0]).name,
        argv,
        __doc__,
        parse,
        run,
        smaller="lower --batch_size, --height, --width or --upscale_tile, give --tile, or use --dtype=bfloat16",
        stopped="the images listed so far are whole",
    )
