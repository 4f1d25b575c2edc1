"""The options of sample.py in one table. Flags, their checks, a PNG's metadata and docs/flags.md follow it.

    python -m jaxdiff.cli.options > docs/flags.md

Where an option goes is its `part`:

    "settings"  an argument of `resolve_settings`, the same for all images of a call
    "image"     an argument of `resolve_images`, with a value for each image
    "prompts"   an argument of `resolve_images`, about all prompts
    "kept"      other flags that affect an image: files, and those that change the compiled program
    "run"       flags of the run only: what is drawn, and where it is written
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from absl import flags

from jaxdiff.typing import SEEDS

INTRODUCTION = """# Flags

The flags of `python sample.py`, or `jaxdiff-sample` if the package is installed. Lists are separated by commas; flags
marked … may be repeated.

| flag | default | meaning |
|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Option:
    """One flag."""

    name: str
    part: Literal["settings", "image", "prompts", "kept", "run"]
    kind: type  # str, int, float or bool
    help: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    many: bool = False  # may be repeated
    count: int = 0  # a list of this many numbers, each at least 0
    needs: str = ""  # another flag, without which this one has no effect
    always: bool = False  # in the metadata even if it has its default
    argument: str = ""  # its name as an argument of `generate`, if that differs
    default_text: str = ""  # the default in words, if it is not a constant
    path: str = ""  # "old": a path that must exist; "any": one that may; "": not a path
    stored: bool = False  # the path may be at an object store

    @property
    def meaning(self) -> str:
        """Its help, and the flag that it needs."""
        return f"With --{self.needs}: {self.help[0].lower()}{self.help[1:]}" if self.needs else self.help

    @property
    def in_metadata(self) -> bool:
        """Whether it belongs to the metadata of an image."""
        return self.part != "run"


def text(name: str, part: Any, help: str, default: str | None = None, **fields: Any) -> Option:
    return Option(name, part, str, help, default, **fields)


def texts(name: str, part: Any, help: str, **fields: Any) -> Option:
    return Option(name, part, str, help, [], many=True, **fields)


def integer(name: str, part: Any, help: str, default: int | None = None, low: int = 1, **fields: Any) -> Option:
    return Option(name, part, int, help, default, low, **fields)


def number(name: str, part: Any, help: str, default: float | None = None, **fields: Any) -> Option:
    return Option(name, part, float, help, default, **fields)


def switch(name: str, part: Any, help: str, default: bool = False, **fields: Any) -> Option:
    return Option(name, part, bool, help, default, **fields)


HOSTS = (
    switch(
        "distributed", "run", "Run as one of several processes, on a TPU pod or under Slurm: connect to the others."
    ),
    text("coordinator_address", "run", "Address of the first of several processes, host:port."),
    integer("num_processes", "run", "Number of processes.", needs="coordinator_address"),
    integer("process_id", "run", "Index of this process, from 0.", low=0, needs="coordinator_address"),
)
SECTIONS: dict[str, tuple[Option, ...]] = {
    "prompts": (
        texts("prompt", "image", "What to draw. (word:1.3), [word] and BREAK work as in the AUTOMATIC1111 web UI. Long "
              "prompts are encoded in chunks.", argument="prompts"),
        text("prompts_file", "run", "A file of prompts: one a line, or .jsonl with prompt, negative_prompt, seed.",
             path="any"),
        text("negative_prompt", "image", "What to steer away from.", argument="negative_prompts"),
        text("prompt_2", "image", "What SDXL's second text encoder reads.", argument="prompts_2",
             default_text="the prompt"),
        text("negative_prompt_2", "image", "Negative prompt of SDXL's second text encoder.", needs="negative_prompt",
             argument="negative_prompts_2", default_text="the negative prompt"),
        text("style", "run", "A preset that adds words to prompt and negative prompt: watercolor, photo, … "
             "(jaxdiff/text/styles.json)."),
        text("styles_file", "run", "A JSON or .csv file of presets instead of the package's own.", needs="style",
             path="any"),
        switch("matrix", "run", "Expand {red|green} and all lines of __wildcards__ in prompts: one image for each "
               "combination."),
        text("wildcards", "run", "Folder of text files. __colour__ in a prompt becomes a line of colour.txt, chosen by "
             "each image's seed, or with --matrix every line. {red|green} is expanded in both cases.", path="any"),
        switch("emphasis", "prompts", "Read (word:1.3), [word] and BREAK in prompts as emphasis and chunks, "
               "[cat:dog:0.5] and [cat|dog] as editing by step, and <lora:…>; --noemphasis reads them as words.",
               True),
        integer("clip_skip", "settings", "Number of last layers of the text encoder to skip.", 0, 0),
        text("blend_prompt", "image", "Blend the prompt's embedding towards this prompt's; see --blend.",
             argument="blend_prompts"),
        text("blend_negative_prompt", "image", "The same for the negative prompt.", needs="blend_prompt",
             argument="blend_negative_prompts"),
        number("blend", "image", "Weight of the blend, from 0 to 1.", 0.5, low=0.0, high=1.0, needs="blend_prompt"),
    ),
    "drawing": (
        integer("num_images", "run", "Images of each prompt.", 1),
        integer("seed", "image", "Seed of the first image. Image i is drawn from seed + i, alone or in any batch, on "
                "any number of devices.", 0, 0, high=SEEDS - 1),
        integer("variation_seed", "image", "Seed of noise to mix in, for a variation of the image.", None, 0,
                high=SEEDS - 1),
        number("variation_strength", "image", "How much of that noise, from 0 (the image of --seed) "
               "to 1 (that of --variation_seed).", 0.1, low=0.0,
               high=1.0, needs="variation_seed"),
        integer("interpolate", "run", "Number of frames from each prompt to the next, or from a single prompt's seed "
                "to the next seed; also writes an animated GIF.", None, 2),
        integer("steps", "settings", "Number of denoising steps. A model may have a default of its own: _steps in "
                "model_index.json.", always=True, default_text="the model's, else 25"),
        number("guidance_scale", "image", "Weight of the prompt; 1 or less turns guidance off. A model may have a "
               "default of its own: _guidance_scale in model_index.json.", default_text="the model's, else 7.5"),
        number("guidance_rescale", "image", "How much of the contrast that guidance adds is removed, from 0 to 1.", 0.0,
               low=0.0,
               high=1.0),
        number("pag_scale", "image", "Weight of perturbed-attention guidance: clearer shapes, for half as much time "
               "again. A model may have a default of its own: _pag_scale in model_index.json.", low=0.0,
               default_text="the model's, else 0"),
        Option("guidance_interval", "settings", float, "Two noise levels, low,high: guidance only between them.",
               count=2),
        text("scheduler", "settings", "Sampling method: ddim, euler, dpmpp_2m, unipc, …; see docs/schedulers.md.",
             default_text="the model's"),
        text("spacing", "settings", "Spacing of the steps: leading, trailing, linspace, karras, ays, ….",
             default_text="the model's"),
        integer("height", "settings", "Pixels, a multiple of 8 for Stable Diffusion.", default_text="the model's"),
        integer("width", "settings", "Pixels, a multiple of 8 for Stable Diffusion.", default_text="the model's"),
    ),
    "from images": (
        text("image", "kept", "Image to start from (PNG, JPEG, WebP, GIF, BMP, TIFF), cropped at its centre and "
             "resized to height and width. An upscaling model enlarges it.", path="old"),
        number("strength", "settings", "How much of the image is redrawn, in (0, 1]. An LCM takes all its steps at any "
               "strength.", low=0.0, high=1.0, needs="image", default_text="0.6; 1 with --mask or --outpaint"),
        text("mask", "kept", "An image, white where --image is redrawn, by an inpainting model or any other. "
             "Transparent areas are kept.", needs="image", path="old"),
        Option("outpaint", "kept", int, "Pixels to add and draw at the left,top,right,bottom of --image.", count=4,
               needs="image"),
        integer("noise_level", "image", "Noise to add to the small image, in timesteps, for an upscaling model.", None,
                0, default_text="20"),
        number("hires", "settings", "Draw this many times smaller first, enlarge, and redraw at full size; also from "
               "an --image, with a --mask or a ControlNet.", low=1.0),
        number("hires_strength", "settings", "Fraction of the steps that redraw at full size.", 0.6, low=0.0, high=1.0,
               needs="hires"),
        Option("hires_upscale", "settings", str, "How to enlarge: resize the image, resize the latents, or use the "
               "network of --upscaler.", "pixel", choices=("pixel", "latent", "network"), needs="hires"),
        number("upscale", "kept", "Enlarge by this factor with a network: each image drawn, or without --prompt the "
               "--image, which may be a folder of images.", low=1.0, high=16.0, argument="scale"),
        text("upscaler", "kept", "The network that enlarges: a .pth or .safetensors file in Real-ESRGAN's layout, a "
             "folder that training exported, or the name of a bundled one.", "icons", path="any"),
        integer("upscale_tile", "kept", "Side of the tiles to enlarge, in pixels of the small image.", 192, 16,
                needs="upscale"),
        texts("controlnet", "kept", "A ControlNet's folder or file; each needs its --control_image.",
              needs="control_image", path="old"),
        texts("control_image", "kept", "The image that a ControlNet follows.", argument="control_images", path="old"),
        Option("controlnet_scale", "kept", float, "Weight of each ControlNet.", [], many=True, needs="control_image",
               default_text="1"),
        switch("control_edges", "kept", "Find the edges (Canny) of each --control_image first.", needs="control_image"),
        integer("tile", "settings", "Encode and decode in tiles of this many latents, to save memory for large "
                "images.", None, 8),
    ),
    "model": (
        text("model", "kept", "A diffusers folder or a .safetensors or .ckpt checkpoint (also at gs:// or s3://), "
             "owner/name on the hub, or the name of a bundled model.", "icons", always=True, path="any",
             stored=True),
        Option("prediction_type", "kept", str, "What the UNet predicts, if the file does not say: epsilon for SD "
               "2.x at 512 pixels.", choices=("epsilon", "v_prediction", "sample", "flow_prediction"),
               default_text="the model's"),
        texts("lora", "kept", "A LoRA's file or folder; path:0.8 sets its weight, 1 by default.", path="old"),
        text("lora_dir", "kept", "Folder of LoRA files that prompts name: <lora:detail:0.7> applies its "
             "detail.safetensors.", path="old"),
        texts("embedding", "kept", "A textual-inversion file or folder; token=path sets its token.", path="old"),
        text("vae", "kept", "Another autoencoder instead of the model's, which may then lack one: a folder or file.",
             default_text="the model's", path="old"),
        text("transformer", "kept", "A safetensors or GGUF file to use instead of the transformer in --model's folder.",
             default_text="the model's", path="old"),
        Option("dtype", "kept", str, "Dtype of computations and weights.", "float32",
               choices=("float32", "bfloat16", "float16"), always=True),
        # The batch size, and whether there is a preview, are recorded because other programs may round differently.
        integer("batch_size", "kept", "Images drawn at once; the last batch is padded, so that one compiled program "
                "draws all.", default_text="batches of equal size, at most 4 a device"),
        integer("fsdp", "run", "Devices over which each parameter is sharded, for models larger than a device.", 1),
        Option("offload", "run", str, "Load parts of the model only while they are needed. text: encode all prompts, "
               "then free the text encoders before loading the rest.", choices=("text",)),
        integer("tensor", "run", "Devices over which the layers themselves are split; try --fsdp first.", 1),
    ),
    "files": (
        text("from_png", "run", "Take the flags from this PNG of an earlier run; flags on the command line "
             "override them.", path="old"),
        text("output", "run", "A .png (castle.png; several: castle-000.png …), a folder (files are named by prompt and "
             "seed), or a pattern of {prompt}, {seed}, {index}: 'o/{prompt}-{index}.png'; also at gs:// or s3://.",
             "outputs", path="any", stored=True),
        switch("overwrite", "run", "Replace existing files. By default new names are numbered (castle-2.png)."),
        switch("grid", "run", "Also write all images on one sheet (…grid.png): a row for each prompt, or columns "
               "for the last alternatives of --matrix; about square with one image a prompt."),
        switch("preview", "kept", "Also write a strip that shows how each image forms (…-preview.png); with --hires "
               "and --upscale, a strip for each stage."),
        switch("preview_animation", "run", "Also write it as an animated WebP (…-preview.webp).", needs="preview"),
        text("preview_vae", "kept", "A tiny autoencoder (TAESD) to decode the strip instead of the model's.",
             needs="preview", path="old"),
        text("cache_dir", "run", "Folder of compiled programs; also at gs:// or s3://.",
             default_text="jaxdiff in your cache folder", path="any", stored=True),
        switch("verbose", "run", "Show the traceback of an error."),
    ),
    "several hosts": HOSTS,
}  # fmt: skip
OPTIONS: dict[str, Option] = {option.name: option for options in SECTIONS.values() for option in options}
FLAG_OF = {option.argument: name for name, option in OPTIONS.items() if option.argument}


def define_one(f: flags.FlagValues, option: Option) -> None:
    """The flag of one option."""
    help = option.meaning + (f" Default: {option.default_text}." if option.default_text else "")
    name, default = option.name, option.default
    low: Any = option.low
    high: Any = option.high
    if option.count:
        flags.DEFINE_list(name, default, help, f)
    elif option.choices:
        flags.DEFINE_enum(name, default, option.choices, help, f)
    elif option.many and option.kind is float:
        flags.DEFINE_multi_float(name, default, help, flag_values=f)
    elif option.many:
        flags.DEFINE_multi_string(name, default, help, f)
    elif option.kind is bool:
        flags.DEFINE_bool(name, default, help, f)
    elif option.kind is int:
        flags.DEFINE_integer(name, default, help, low, high, f)
    elif option.kind is float:
        flags.DEFINE_float(name, default, help, low, high, f)
    else:
        flags.DEFINE_string(name, default, help, f)


def define(options: Mapping[str, Option] = OPTIONS) -> flags.FlagValues:
    """The flags, separate from absl's global ones, so that any program may import this module."""
    f = flags.FlagValues()
    for option in options.values():
        define_one(f, option)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    return f


def is_given(value: Any) -> bool:
    """Whether a flag's value is anything but None, an empty list or False."""
    return value is not None and value is not False and value != []


def document(introduction: str = INTRODUCTION, sections: Mapping[str, Sequence[Option]] = SECTIONS) -> str:
    """docs/flags.md, or that of another command."""
    rows = []
    for section, options in sections.items():
        rows.append(f"| **{section}** | | |")
        for option in options:
            default = option.default_text or (f"`{option.default}`" if is_given(option.default) else "")
            choices = f" One of {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
            meaning = (option.meaning + choices).replace("|", "\\|").replace("__", "\\_\\_")
            rows.append(f"| `--{option.name}`{' …' if option.many else ''} | {default} | {meaning} |")
    return introduction + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(document(), end="")
