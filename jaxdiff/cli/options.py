"""The options of sample.py in one table. Flags, their checks, a PNG's metadata and docs/flags.md follow it.

    python -m jaxdiff.cli.options > docs/flags.md

Where an option goes is its `part`:

    "settings"  an argument of `resolve_settings`, the same for all images of a call
    "image"     an argument of `resolve_images`, with a value for each image
    "prompts"   an argument of `resolve_images`, about all prompts
    "kept"      what else draws an image again: files, and what changes the compiled program
    "run"       the run alone: what is drawn, and where it is written
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from absl import flags

from jaxdiff.typing import SEEDS

INTRODUCTION = """# Flags

The flags of `python sample.py`, which is `jaxdiff-sample` where the package is installed. Lists are written with
commas, and flags marked … may be given again for more.

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
    many: bool = False  # may be given again for more
    count: int = 0  # a list of so many numbers, none below 0
    needs: str = ""  # another flag, without which this one means nothing
    always: bool = False  # in the metadata, even if it has its default
    argument: str = ""  # what `generate` calls it, if not by its name
    without: str = ""  # the default in words, where something else decides
    path: str = ""  # "old": of a file or folder that must exist; "any": of one that may
    stored: bool = False  # the path may be of an object store

    @property
    def meaning(self) -> str:
        """What it does, and with which other flag."""
        return f"With --{self.needs}: {self.help[0].lower()}{self.help[1:]}" if self.needs else self.help

    @property
    def is_kept(self) -> bool:
        """Whether it belongs to the metadata of an image."""
        return self.part != "run"


def text(name: str, part: Any, help: str, default: str | None = None, **more: Any) -> Option:
    return Option(name, part, str, help, default, **more)


def texts(name: str, part: Any, help: str, **more: Any) -> Option:
    return Option(name, part, str, help, [], many=True, **more)


def whole(name: str, part: Any, help: str, default: int | None = None, low: int = 1, **more: Any) -> Option:
    return Option(name, part, int, help, default, low, **more)


def number(name: str, part: Any, help: str, default: float | None = None, **more: Any) -> Option:
    return Option(name, part, float, help, default, **more)


def switch(name: str, part: Any, help: str, default: bool = False, **more: Any) -> Option:
    return Option(name, part, bool, help, default, **more)


HOSTS = (
    switch("distributed", "run", "This is one of several processes, on a TPU pod or under Slurm: find the others."),
    text("coordinator_address", "run", "Where the first of several processes listens, host:port."),
    whole("num_processes", "run", "How many processes there are.", needs="coordinator_address"),
    whole("process_id", "run", "Which of them this is, from 0.", low=0, needs="coordinator_address"),
)
SECTIONS: dict[str, tuple[Option, ...]] = {
    "prompts": (
        texts("prompt", "image", "What to draw. (word:1.3), [word] and BREAK work as in the AUTOMATIC1111 web UI. Long "
              "prompts go in chunks, each of which attends to its own.", argument="prompts"),
        text("prompts_file", "run", "A file of prompts: one a line, or .jsonl with prompt, negative_prompt, seed.",
             path="any"),
        text("negative_prompt", "image", "What to steer away from.", argument="negative_prompts"),
        text("prompt_2", "image", "What SDXL's second text encoder reads.", argument="prompts_2", without="the prompt"),
        text("negative_prompt_2", "image", "What it reads as negative prompt.", needs="negative_prompt",
             argument="negative_prompts_2", without="the negative prompt"),
        text("style", "run", "A preset that adds words to prompt and negative prompt: watercolor, photo, … "
             "(jaxdiff/text/styles.json)."),
        text("styles_file", "run", "A JSON or .csv file of presets in place of the package's own.", needs="style",
             path="any"),
        switch("matrix", "run", "Expand {red|green} and every line of __wildcards__ in prompts, an image for each "
               "combination."),
        text("wildcards", "run", "Folder of text files. __colour__ in a prompt becomes a line of colour.txt, drawn by "
             "each image's seed, or with --matrix every line. {red|green} is expanded in both cases.", path="any"),
        switch("emphasis", "prompts", "Read (word:1.3), [word] and BREAK in prompts as emphasis and chunks, "
               "[cat:dog:0.5] and [cat|dog] as editing by step, and <lora:…>; --noemphasis takes them as they are.",
               True),
        whole("clip_skip", "settings", "Text encoder layers left out at the end.", 0, 0),
        text("blend_prompt", "image", "Blend the prompt's embedding towards this prompt's; see --blend.",
             argument="blend_prompts"),
        text("blend_negative_prompt", "image", "The same for the negative prompt.", needs="blend_prompt",
             argument="blend_negative_prompts"),
        number("blend", "image", "How far, from 0 to 1.", 0.5, low=0.0, high=1.0, needs="blend_prompt"),
    ),
    "drawing": (
        whole("num_images", "run", "Images of each prompt.", 1),
        whole("seed", "image", "Seed of the first image. Image i is drawn from seed + i, alone or in any batch, on any "
              "number of devices.", 0, 0, high=SEEDS - 1),
        whole("variation_seed", "image", "Mixes the noise of this seed in, for a variation of the image.", None, 0,
              high=SEEDS - 1),
        number("variation_strength", "image", "How much of that noise, from 0 (the seed's own image) "
               "to 1 (the other's).", 0.1, low=0.0,
               high=1.0, needs="variation_seed"),
        whole("interpolate", "run", "Frames from each prompt and its negative prompt to the next, or from one prompt's "
              "seed to the next seed; also as an animated GIF.", None, 2),
        whole("steps", "settings", "Number of denoising steps. The folder of a distilled model recommends its own as "
              "_steps in model_index.json.", always=True, without="the model's, else 25"),
        number("guidance_scale", "image", "Weight of the prompt; 1 or less turns guidance off. A folder recommends its "
               "own as _guidance_scale in model_index.json.", without="the model's, else 7.5"),
        number("guidance_rescale", "image", "How much of the contrast that guidance adds is taken back.", 0.0, low=0.0,
               high=1.0),
        Option("guidance_interval", "settings", float, "Two noise levels, low,high: guidance only between them.",
               count=2),
        text("scheduler", "settings", "ddim, euler, dpmpp_2m, unipc, …; docs/schedulers.md says which to use when.",
             without="the model's"),
        text("spacing", "settings", "Spacing of the steps: leading, trailing, linspace, karras, ays, ….",
             without="the model's"),
        whole("height", "settings", "Pixels, a multiple of 8 for Stable Diffusion.", without="the model's"),
        whole("width", "settings", "Pixels, a multiple of 8 for Stable Diffusion.", without="the model's"),
    ),
    "from images": (
        text("image", "kept", "Image to start from (PNG, JPEG, WebP, GIF, BMP, TIFF), cut at its centre and resized to "
             "height and width. An upscaling model enlarges it.", path="old"),
        number("strength", "settings", "How much of the image is redrawn, in (0, 1]. An LCM takes all its steps at any "
               "strength.", low=0.0, high=1.0, needs="image", without="0.6; 1 with --mask or --outpaint"),
        text("mask", "kept", "An image, white where --image is to be redrawn, by an inpainting model or any other. "
             "What is transparent is kept.", needs="image", path="old"),
        Option("outpaint", "kept", int, "Pixels added at left,top,right,bottom of --image, and drawn.", count=4,
               needs="image"),
        whole("noise_level", "image", "Noise put on the small image, for an upscaling model.", None, 0, without="20"),
        number("hires", "settings", "Draw this many times smaller first, enlarge, and draw the details; also from an "
               "--image, with a --mask, under a ControlNet.", low=1.0),
        number("hires_strength", "settings", "How much is redrawn at full size.", 0.6, low=0.0, high=1.0,
               needs="hires"),
        Option("hires_upscale", "settings", str, "What is enlarged: the image, the latents, or the image by the "
               "network of --upscaler.", "pixel", choices=("pixel", "latent", "network"), needs="hires"),
        number("upscale", "kept", "Enlarge so many times by a network: each image drawn, or without --prompt the "
               "--image, which may be a folder of images.", low=1.0, high=16.0, argument="scale"),
        text("upscaler", "kept", "The network that enlarges: a .pth or .safetensors file in Real-ESRGAN's layout, a "
             "folder that training exported, or the name of a bundled one.", "icons", path="any"),
        whole("upscale_tile", "kept", "Enlarge in tiles of this many pixels of the small image.", 192, 16,
              needs="upscale"),
        texts("controlnet", "kept", "A ControlNet, a folder or file, each with its --control_image.",
              needs="control_image", path="old"),
        texts("control_image", "kept", "What a ControlNet follows.", argument="control_images", path="old"),
        Option("controlnet_scale", "kept", float, "Weight of each ControlNet.", [], many=True, needs="control_image",
               without="1"),
        switch("control_edges", "kept", "Find the edges (Canny) of each --control_image first.", needs="control_image"),
        whole("tile", "settings", "Encode and decode in tiles of this many latents, for large images.", None, 8),
    ),
    "model": (
        text("model", "kept", "A diffusers folder, a .safetensors or .ckpt checkpoint, either at gs:// or s3:// as "
             "well, owner/name on the hub, or the name of a bundled model.", "icons", always=True, path="any",
             stored=True),
        Option("prediction_type", "kept", str, "What the UNet predicts, where the file does not say: epsilon for SD "
               "2.x at 512 pixels.", choices=("epsilon", "v_prediction", "sample", "flow_prediction"),
               without="the model's"),
        texts("lora", "kept", "A LoRA's file or folder; path:0.8 sets its weight.", path="old"),
        text("lora_dir", "kept", "Folder of the LoRA files that prompts name: <lora:detail:0.7> is its "
             "detail.safetensors.", path="old"),
        texts("embedding", "kept", "A textual-inversion file or folder; token=path names its token.", path="old"),
        text("vae", "kept", "Another autoencoder in place of the model's, which may then lack one: a folder or a file.",
             without="the model's", path="old"),
        text("transformer", "kept", "A file in place of the transformer of the --model's folder: safetensors or GGUF.",
             without="the model's", path="old"),
        Option("dtype", "kept", str, "Type to compute in and to hold the weights in.", "float32",
               choices=("float32", "bfloat16", "float16"), always=True),
        # The batch size, and whether there is a preview, are kept because other programs may round otherwise.
        whole("batch_size", "kept", "Images drawn at once; the last batch is filled up, so that one compiled program "
              "draws all.", without="batches of equal size, at most 4 a device"),
        whole("fsdp", "run", "Devices over which each parameter is kept divided, for models larger than a device.", 1),
        Option("offload", "run", str, "What is held only while it is used: with text, the text encoders read all "
               "prompts, and are let go before the rest of the model is loaded.", choices=("text",)),
        whole("tensor", "run", "Devices over which the layers themselves are divided; try --fsdp first.", 1),
    ),
    "files": (
        text("from_png", "run", "Take the flags that this PNG of an earlier run holds; flags given beside it "
             "win.", path="old"),
        text("output", "run", "A .png (castle.png; several: castle-000.png …), a folder (files are named by prompt and "
             "seed), or a pattern of {prompt}, {seed}, {index}: 'o/{prompt}-{index}.png'; gs:// and s3:// as well.",
             "outputs", path="any", stored=True),
        switch("overwrite", "run", "Replace files that exist; without, a new file's name is numbered (castle-2.png)."),
        switch("grid", "run", "Also write all images on one sheet (…grid.png): one row a prompt, or one for each of "
               "the last alternatives of a --matrix; about a square with one image a prompt."),
        switch("preview", "kept", "Also write how each image came about, as a strip (…-preview.png): with --hires and "
               "--upscale a strip of each layer."),
        switch("preview_animation", "run", "The same also as an animated WebP (…-preview.webp).", needs="preview"),
        text("preview_vae", "kept", "A tiny autoencoder (TAESD) that draws the strip in place of the model's.",
             needs="preview", path="old"),
        text("cache_dir", "run", "Folder of compiled programs; gs:// and s3:// as well.",
             without="jaxdiff in your cache folder", path="any", stored=True),
        switch("verbose", "run", "Show the traceback of an error."),
    ),
    "several hosts": HOSTS,
}  # fmt: skip
OPTIONS: dict[str, Option] = {option.name: option for options in SECTIONS.values() for option in options}
FLAG_OF = {option.argument: name for name, option in OPTIONS.items() if option.argument}


def define_one(f: flags.FlagValues, option: Option) -> None:
    """The flag of one option."""
    help = option.meaning + (f" Default: {option.without}." if option.without else "")
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
    """The flags, apart from absl's global ones, so that any program may import this module."""
    f = flags.FlagValues()
    for option in options.values():
        define_one(f, option)
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    return f


def is_given(value: Any) -> bool:
    """Whether a flag was given or has a default: not None, an empty list or a switch that is off."""
    return value is not None and value is not False and value != []


def document(introduction: str = INTRODUCTION, sections: Mapping[str, Sequence[Option]] = SECTIONS) -> str:
    """docs/flags.md, or that of another command."""
    rows = []
    for section, options in sections.items():
        rows.append(f"| **{section}** | | |")
        for option in options:
            default = option.without or (f"`{option.default}`" if is_given(option.default) else "")
            choices = f" One of {', '.join(f'`{choice}`' for choice in option.choices)}." if option.choices else ""
            meaning = (option.meaning + choices).replace("|", "\\|").replace("__", "\\_\\_")
            rows.append(f"| `--{option.name}`{' …' if option.many else ''} | {default} | {meaning} |")
    return introduction + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(document(), end="")
