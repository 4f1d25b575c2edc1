"""The flags of `python -m jaxdiff.evaluation`, with all checks that need no model."""

import math

from absl import flags

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import at_home, check_path, read
from jaxdiff.evaluation.measures import MIN_IMAGES
from jaxdiff.typing import SEEDS

DRAWING_FLAGS = (
    "dtype", "num_images", "seed", "steps", "guidance_scale", "pag_scale", "scheduler", "spacing", "height",
    "width", "negative_prompt", "batch_size",
)  # fmt: skip
DATA_FLAGS = (
    "split", "held_out_split", "real_split", "group", "image_column", "text_column", "features", "pairs", "most_real",
)  # fmt: skip

PATHS = ("model", "prompts", "images", "encoder", "data", "features", "output", "cache_dir")


def without_drawing(f: flags.FlagValues) -> tuple[str, ...]:
    """Flags without effect if no image is drawn; --model may still provide the encoder."""
    return DRAWING_FLAGS if f.encoder is None else (*DRAWING_FLAGS, "model")


def define() -> flags.FlagValues:
    """The flags, apart from absl's global ones."""
    f = flags.FlagValues()

    def string(name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, f)

    def integer(name: str, default: int | None, help: str, low: int = 1, high: int | None = None) -> None:
        flags.DEFINE_integer(name, default, help, low, high, f)

    string(
        "model",
        "icons",
        "The model to measure: a diffusers folder, a one-file checkpoint, a hub id, or the name of a bundled model.",
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Dtype of the model.", flag_values=f)
    string("prompts", None, "A file of prompts: one a line, or .jsonl with prompt, negative_prompt, seed.")
    string("negative_prompt", None, "What to steer away from, for lines without a negative prompt.")
    integer("num_images", 4, "Images of each prompt; variety needs at least two.")
    integer("seed", 0, "Seed of the first image; the next ones count up.", 0, SEEDS - 1)
    integer("steps", None, "Number of denoising steps; default: the model's, else 25.")
    flags.DEFINE_float(
        "guidance_scale",
        None,
        "Weight of the prompt; 1 or less turns guidance off; default: the model's, else 7.5.",
        flag_values=f,
    )
    flags.DEFINE_float(
        "pag_scale", None, "Weight of perturbed-attention guidance; default: the model's, else 0.", 0.0, flag_values=f
    )
    string("scheduler", None, "ddim, euler, dpmpp_2m, …; default: what the model's config says.")
    string("spacing", None, "Spacing of the steps; default: what the config says.")
    integer("height", None, "Pixels; default: the model's own.")
    integer("width", None, "Pixels; default: the model's own.")
    integer("batch_size", None, "Images drawn at once; default: batches of equal size, at most 4 images a device.")

    string("images", None, "A folder of images to measure instead of drawing: drawn by sample.py, or in the order of "
           "--prompts, or with captions in a metadata.jsonl, a metadata.csv or text files.")  # fmt: skip
    string("encoder", None, "CLIP to measure with: a transformers CLIPModel folder, or one with text_encoder and "
           "vision_encoder; default: the model's own.")  # fmt: skip
    integer("encode_batch_size", 64, "Images encoded at once.")
    integer("threads", 8, "Threads that read images.")

    string("data", None, "Captioned images that the model was trained on, in any format that train.py reads.")
    string("split", "train", "Their training split.")
    string("held_out_split", None, "A split that the model was not trained on, for the same measures of real images.")
    string("real_split", None, "The split to compare distances and variety with; default: --split.")
    string(
        "group",
        None,
        "Metadata column whose values say which real images belong together, such as subject; default: the caption.",
    )
    string("image_column", "", "Of tables and records; default: a usual name.")
    string("text_column", "", "Of tables and records; default: a usual name.")
    string(
        "features",
        None,
        "Folder to cache features of the data in; default: in your cache folder.",
    )
    integer("pairs", 96, "Number of drawn images to show next to their nearest training images, the nearest first.", 0)
    integer("most_real", 10_000, "Maximum number of held-out images, and of real images for the kernel distance, "
            "chosen at random.", MIN_IMAGES)  # fmt: skip

    string(
        "output", "report", "Folder of the report: report.md, report.json, images.jsonl, sheets, and the images drawn."
    )
    flags.DEFINE_bool("overwrite", False, "Replace a report that is there.", f)
    string("cache_dir", None, "Folder of compiled programs; default: jaxdiff in your cache folder.")
    flags.DEFINE_bool("verbose", False, "Show the traceback of an error.", f)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    return f


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line, with all checks that need no files. Raises UsageError."""
    f = read(define(), argv, "--help shows all flags")
    if f.help:
        return f
    for name in PATHS:
        path: str | None = f[name].value
        if path is not None:
            check_path(f"--{name}", path, stored=name in ("model", "cache_dir"))
            f[name].value = at_home(path)
    for name in ("guidance_scale", "pag_scale"):
        value: float | None = f[name].value
        if value is not None and not math.isfinite(value):
            raise UsageError(f"--{name} {value} must be finite.")
    if f.images is None and f.prompts is None:
        raise UsageError(
            "--prompts is missing: give a file with a prompt a line, or --images, a folder of images to measure."
        )
    if f.images is not None and (unused := [name for name in without_drawing(f) if f[name].present]):
        raise UsageError(f"--{unused[0]} is for drawing, and with --images nothing is drawn: leave one of them out.")
    if f.data is None and (unused := [name for name in DATA_FLAGS if f[name].present]):
        raise UsageError(f"--{unused[0]} goes with --data: give that too, or leave --{unused[0]} out.")
    if f.held_out_split is not None and f.held_out_split == f.split:
        raise UsageError(
            f"--held_out_split {f.held_out_split} is also --split: name one that the model was not trained on."
        )
    return f
