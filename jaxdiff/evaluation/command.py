"""Measure how good, how varied and how original a model's images are.

    python -m jaxdiff.evaluation --model my-model/ --prompts prompts.txt --data my-images/ --held_out_split test
    python -m jaxdiff.evaluation --images drawn/ --encoder clip-vit-large-patch14/ --output report/

Draws the prompts, or takes the images of a folder, and writes a folder: report.md (also to stdout), report.json,
images.jsonl with a line for each image, sheets of images, and the images drawn. Progress, warnings and errors go to
stderr. If it is interrupted, the same command resumes. Exit code: 0; 2 for wrong flags; 130 after Ctrl-C; 1 for any
other failure.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import jaxdiff
from jaxdiff.cli import errors
from jaxdiff.cli.errors import Failure, UsageError, file_errors
from jaxdiff.cli.flags import flag_errors
from jaxdiff.cli.outputs import make_folder
from jaxdiff.cli.progress import progress_bar
from jaxdiff.cli.requests import batch_size
from jaxdiff.config import ConfigError
from jaxdiff.data.captioned import open_source
from jaxdiff.data.source import Source, files_digest
from jaxdiff.evaluation import measures, outputs, report
from jaxdiff.evaluation.encoder import EXPECTED_FOLDER, Encoder, encode_texts, has_encoder, load_encoder
from jaxdiff.evaluation.features import Features, cached_features, encode_records
from jaxdiff.evaluation.flags import parse
from jaxdiff.evaluation.groups import has_column, real_groups
from jaxdiff.evaluation.images import Images, draw, find_images, image_requests, plain
from jaxdiff.evaluation.measures import EncodedImages
from jaxdiff.evaluation.outputs import Results
from jaxdiff.io import cache, model_paths, pretrained
from jaxdiff.sampling.resolve import resolve_settings
from jaxdiff.stores import cache_folder
from jaxdiff.text.prompt_files import PromptError, PromptLine, read_prompts
from jaxdiff.typing import Params

NAME = "jaxdiff.evaluation"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The splits of the data that images are compared with."""

    train: Source
    real: Source
    held_out: Source | None


def prompt_lines(f: flags.FlagValues) -> list[PromptLine] | None:
    """The lines of --prompts; None if it is not given. Raises UsageError."""
    try:
        return None if f.prompts is None else read_prompts(f.prompts)
    except PromptError as e:
        raise UsageError(f"--prompts: {e}") from None


def features_folder(f: flags.FlagValues) -> Path:
    """The folder that caches features of the data."""
    return Path(f.features) if f.features else cache_folder() / "features"


def open_splits(f: flags.FlagValues) -> Splits | None:
    """The data's splits, each opened once."""
    if f.data is None:
        return None
    columns = {"image_column": f.image_column, "text_column": f.text_column}

    @functools.cache
    def source(split: str) -> Source:
        return open_source(f.data, split, cache=features_folder(f), **columns)

    def open_split(name: str) -> Source:
        try:
            return source(f[name].value)
        except ConfigError as e:
            raise UsageError(f"--data, --{name}: {e}") from None

    make_folder(features_folder(f), "--features")
    train, real = open_split("split"), open_split("split" if f.real_split is None else "real_split")
    if f.group is not None and not has_column(real, f.group):
        raise UsageError(f"--group {f.group}: no row of {real.name} has that in its metadata: name another column.")
    return Splits(train, real, None if f.held_out_split is None else open_split("held_out_split"))


def encoder_folder(f: flags.FlagValues) -> str:
    """The folder of the encoder. Raises UsageError."""
    if f.encoder is not None:
        return str(f.encoder)
    with file_errors("--model"):
        folder = model_paths.find(f.model)
    if not folder.is_dir() or not has_encoder(folder):
        raise UsageError(f"--encoder is missing: {f.model} has no vision encoder of its own; give {EXPECTED_FOLDER}.")
    return str(folder)


def open_encoder(f: flags.FlagValues, folder: str) -> tuple[Encoder, Params]:
    try:
        return load_encoder(folder)
    except ValueError as e:
        raise Failure(f"--encoder: {e}") from None


def drawing_options(f: flags.FlagValues, model: jaxdiff.Model) -> dict[str, Any]:
    """Arguments of `generate` that all images share. Raises UsageError if one of them, or the model, is wrong."""
    if model.inpaints or model.family == "upscaler":
        raise UsageError(f"--model {f.model} draws from an image: give one that draws from a prompt alone.")
    if f.pag_scale and (model.unet is None or model.is_gan):
        raise UsageError("--pag_scale is for models with a UNet that draws step by step: leave it out.")
    names = ("steps", "guidance_scale", "spacing", "height", "width")
    options: dict[str, Any] = {name: f[name].value for name in names}
    try:
        with flag_errors():
            settings = resolve_settings(model, scheduler=f.scheduler, **options)
    except ValueError as e:
        raise UsageError(str(e)) from None
    if model.is_gan:
        return options
    return {**options, "scheduler": settings.scheduler, "steps": settings.steps, "pag_scale": f.pag_scale}


def draw_images(f: flags.FlagValues, lines: list[PromptLine], work: Path) -> Images:
    """Draw the images that are not yet in the folder of the unfinished report."""
    import jax

    with file_errors("--model"):
        path = model_paths.find(f.model)
        model, params = jaxdiff.load(path, dtype=f.dtype)
    options = drawing_options(f, model)
    requests = image_requests(lines, f.num_images, f.seed, f.negative_prompt)
    report_settings = {"model": model_digest(path), "dtype": f.dtype, "options": options, "images": requests}
    outputs.begin(work, report_settings)
    size = f.batch_size or batch_size([len(requests)], jax.local_device_count())
    params = jaxdiff.replicate(params, jax.local_devices()[:size])
    with progress_bar("drawing", len(requests)) as advance:
        return draw(model, params, requests, work / "images", batch_size=size, progress=advance, **options)


def model_digest(path: Path) -> str:
    """A digest of the names, sizes and times of a model's files."""
    return files_digest(sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])


def encode_with_prompts(
    source: Any, prompts: Sequence[str], encoder: Encoder, params: Params, f: flags.FlagValues, label: str
) -> EncodedImages:
    """Features of images and their prompts. Raises Failure if an image cannot be read."""

    def fail(name: str, reason: str) -> None:
        raise Failure(f"{name} cannot be read ({reason}): repair the file, or remove it.")

    with progress_bar(f"encoding {label}", len(source)) as advance:
        arrays = encode_records(
            source, range(len(source)), encoder, params,
            batch_size=f.encode_batch_size, threads=f.threads, unread=fail, progress=advance,
        )  # fmt: skip
    return with_texts(arrays["features"], arrays["pixels"], prompts, encoder, params)


def split_features(
    source: Source, f: flags.FlagValues, encoder: Encoder, params: Params, label: str, notes: list[str]
) -> Features:
    """Features of a split; unreadable images are counted in a note appended to `notes`."""
    with progress_bar(f"encoding {label}", len(source)) as advance:
        features = cached_features(
            source, features_folder(f), encoder, params,
            batch_size=f.encode_batch_size, threads=f.threads, progress=advance,
        )  # fmt: skip
    if unreadable := features.records - len(features):
        notes.append(
            f"{unreadable} of the {features.records} {label} of {source.name} cannot be read and are left out."
        )
    return features


def held_out_sample(
    source: Source, features: Features, max_images: int, encoder: Encoder, params: Params
) -> EncodedImages:
    """At most `max_images` held-out images, with their first captions."""
    rows = measures.random_rows(len(features), max_images)
    captions = [source.read(i, image=False).captions[0] for i in features.index[rows].tolist()]
    sample, pixels = (features.take(name, rows) for name in ("features", "pixels"))
    return with_texts(sample, pixels, captions, encoder, params)


def with_texts(
    features: np.ndarray, pixels: np.ndarray, prompts: Sequence[str], encoder: Encoder, params: Params
) -> EncodedImages:
    """Images together with their prompts; each distinct prompt is encoded once."""
    texts, prompt_index = np.unique(np.asarray(prompts, object), return_inverse=True)
    encoded, truncated = encode_texts(encoder, params, list(texts))
    return EncodedImages(features, pixels, encoded, prompt_index.ravel(), truncated)


def measure(images: Images, splits: Splits | None, encoder: Encoder, params: Params, f: flags.FlagValues) -> Results:
    """All measures of these images that the given data allow."""
    drawn = encode_with_prompts(images, [plain(p) for p in images.prompts], encoder, params, f, "images")
    unreadable_notes: list[str] = []
    held_out_features = held_out = None
    if splits is not None and splits.held_out is not None:
        held_out_features = split_features(splits.held_out, f, encoder, params, "held-out images", unreadable_notes)
        held_out = held_out_sample(splits.held_out, held_out_features, f.most_real, encoder, params)
    rows, notes, scores, ranks = measures.agreement(drawn, held_out)
    if splits is None:
        variety_rows, variety_notes = measures.varieties(drawn, None, [], "")
        notes += [*variety_notes, "Distances to real images and originality need the training data: give --data."]
        return Results(rows + variety_rows, notes, scores, ranks, None, None)
    train = split_features(splits.train, f, encoder, params, "training images", unreadable_notes)
    if splits.real is splits.train:
        real = train
    elif held_out_features is not None and splits.real is splits.held_out:
        real = held_out_features
    else:
        real = split_features(splits.real, f, encoder, params, "real images", unreadable_notes)
    notes += unreadable_notes
    reference = None if real is held_out_features else held_out
    distance_rows, distance_notes = measures.distances(drawn, real, reference, f.most_real)
    groups = real_groups(splits.real, real.index, f.group)
    variety_rows, variety_notes = measures.varieties(drawn, real, groups, f.group or "caption")
    with progress_bar("comparing", 2 * len(train) * (1 if held_out is None else 2)) as advance:
        originality_rows, originality_notes, nearest = measures.originality(drawn, train, held_out, advance)
    rows += [*distance_rows, *variety_rows, *originality_rows]
    notes += [*distance_notes, *variety_notes, *originality_notes]
    return Results(rows, notes, scores, ranks, nearest, train)


def run(f: flags.FlagValues) -> None:
    """Measure what the flags say. Cheap checks come first."""
    output = outputs.check_output(f)
    with outputs.locked(outputs.unfinished(output), f.output):
        make_report(f, output)


def make_report(f: flags.FlagValues, output: Path) -> None:
    """Make the report in a folder that this process has locked."""
    lines = prompt_lines(f)
    try:
        images = None if f.images is None else find_images(Path(f.images), lines)
    except ConfigError as e:
        raise UsageError(str(e)) from None
    if images is None:  # before any weights are read
        with file_errors("--model"):
            model, _ = pretrained.described(model_paths.find(f.model), f.dtype)
        drawing_options(f, model)
    splits, folder = open_splits(f), encoder_folder(f)
    encoder, params = open_encoder(f, folder)
    cache.cache_compilations(f.cache_dir)
    work = outputs.unfinished(output)
    if images is None:
        assert lines is not None
        images = draw_images(f, lines, work)
    else:
        outputs.begin(work, {"images": str(f.images), "digest": hashlib.sha256(repr(images).encode()).hexdigest()})
    results = measure(images, splits, encoder, params, f)
    summary = f"{len(images)} images of {len(set(images.prompts))} prompts, " + (
        f"from {f.images}" if f.images else f"drawn by {f.model}"
    )
    heading = [summary, f"encoder: {folder}", *([] if f.data is None else [f"data: {f.data}, split {f.split}"])]
    text = report.table(results.rows, results.notes, heading)
    outputs.write(work, images, results, None if splits is None else splits.train, f, text)
    outputs.publish(work, output, f.overwrite)
    print(text, end="", flush=True)


def main(argv: list[str]) -> int:
    """Run a command line; returns the exit code."""
    return errors.main(
        NAME,
        argv,
        __doc__,
        parse,
        run,
        smaller="lower --batch_size or --encode_batch_size, or use --dtype=bfloat16",
        stopped="the same command goes on where it was",
    )
