"""The flags of sample.py, and what can be said of them without a model."""

import math
from typing import Any

from absl import flags

from jaxdiff.cli.errors import UsageError
from jaxdiff.sampling.resolve import as_interval

SEEDS = 2**32


def define() -> flags.FlagValues:
    """The flags, apart from absl's global ones, so that any program may import this module."""
    f = flags.FlagValues()

    def text(name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, f)

    def texts(name: str, help: str) -> None:
        flags.DEFINE_multi_string(name, [], help, f)

    def whole(name: str, default: int | None, help: str, low: int = 1, high: int | None = None) -> None:
        flags.DEFINE_integer(name, default, help, low, high, f)

    def number(name: str, default: float | None, help: str, low: float | None = None, high: float | None = None):
        flags.DEFINE_float(name, default, help, low, high, f)

    def switch(name: str, help: str, default: bool = False) -> None:
        flags.DEFINE_bool(name, default, help, f)

    text("model", "icons", "A diffusers folder, a one-file checkpoint, a hub id, or the name of a bundled model.")
    flags.DEFINE_enum("prediction_type", None, ["epsilon", "v_prediction", "sample", "flow_prediction"],
                      "What the UNet predicts; default: what the checkpoint says.", flag_values=f)  # fmt: skip
    texts("lora", "A LoRA file; path:0.8 sets its weight. Give the flag again for more.")
    texts("embedding", "A textual-inversion file; token=path names its token. Give the flag again for more.")
    text("vae", None, "Another autoencoder in place of the model's: a folder or a file.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"],
                      "Type to compute in and to hold the weights in.", flag_values=f)  # fmt: skip

    texts("prompt", "What to draw; give the flag again for more prompts.")
    text("prompts_file", None, "A file of prompts: one a line, or .jsonl with prompt, negative_prompt, seed.")
    text("negative_prompt", None, "What to steer away from.")
    text("prompt_2", None, "What SDXL's second text encoder reads; default: the prompt.")
    text("negative_prompt_2", None, "What it reads as negative prompt; default: the negative prompt.")
    text("style", None, "A preset that adds words to prompt and negative prompt: watercolor, photo, …")
    text("styles_file", None, "A JSON file of presets in place of the package's own.")
    switch("matrix", "Expand {red|green} and every line of __wildcards__ in prompts, one picture for each combination.")
    text(
        "wildcards",
        None,
        "Folder of text files: __colour__ in a prompt becomes a line of colour.txt, drawn by each picture's seed. "
        "{red|green} is expanded as by --matrix.",
    )
    switch("emphasis", "Read (word:1.3), [word] and BREAK in prompts as emphasis and chunks.", True)
    whole("clip_skip", 0, "Text encoder layers left out at the end.", 0)

    whole("seed", 0, "Seed of the first picture; the next ones count up.", 0, SEEDS - 1)
    whole("variation_seed", None, "Mixes the noise of this seed in, for a variation of the picture.", 0, SEEDS - 1)
    number("variation_strength", 0.1, "How much of it: 0 is the seed's own picture, 1 the other's.", 0.0, 1.0)
    whole("interpolate", None, "Frames from each prompt to the next (from one: seed to seed), also as a GIF.", 2)
    whole("num_images", 1, "Pictures of each prompt.")
    whole("steps", 25, "Number of denoising steps.")
    number("guidance_scale", None, "Weight of the prompt, 1 or less: off; default: the model's, else 7.5.")
    number("guidance_rescale", 0.0, "How much of the contrast that guidance adds is taken back.", 0.0, 1.0)
    flags.DEFINE_list("guidance_interval", None, "Two noise levels, low,high: guidance only between them.", f)
    text("scheduler", None, "ddim, euler, dpmpp_2m, unipc, …; default: what the model's config says.")
    text("spacing", None, "Spacing of the steps: leading, trailing, linspace, karras, ays, …; default: as above.")
    whole("height", None, "Pixels; default: the model's own.")
    whole("width", None, "Pixels; default: the model's own.")

    text("image", None, "Picture to start from; cut at its centre and resized to height and width.")
    number("strength", None, "With --image: how much is redrawn, in (0, 1]; default 0.6, with a mask 1.", 0.0, 1.0)
    text("mask", None, "With --image: a picture, white where the image is to be redrawn.")
    flags.DEFINE_list("outpaint", None, "With --image: pixels added at left,top,right,bottom, and drawn.", f)
    whole("noise_level", 20, "Of an upscaling model: noise put on the small picture.", 0)
    number("hires", None, "Draw this many times smaller first, enlarge, and draw the details.", 1.0)
    number("hires_strength", 0.6, "With --hires: how much is redrawn at full size.", 0.0, 1.0)
    flags.DEFINE_enum("hires_upscale", "pixel", ["pixel", "latent"], "With --hires: what is enlarged.", flag_values=f)
    texts("controlnet", "A ControlNet, a folder or file; again for more, one --control_image for each.")
    texts("control_image", "What a ControlNet follows.")
    flags.DEFINE_multi_float("controlnet_scale", [], "Weight of each ControlNet; default 1.", flag_values=f)
    switch("control_edges", "Find the edges (Canny) of each --control_image first.")
    whole("tile", None, "Encode and decode in tiles of this many latents, for large pictures.", 8)
    text("blend_prompt", None, "Blend the prompt's embedding towards this prompt's; see --blend.")
    text("blend_negative_prompt", None, "With --blend_prompt: the same for the negative prompt.")
    number("blend", 0.5, "With --blend_prompt: how far, from 0 to 1.", 0.0, 1.0)

    whole("batch_size", None, "Pictures drawn at once; the last batch is filled up, so that one compiled program draws "
          "all. Default: batches of equal size, at most 4 pictures a device.")  # fmt: skip
    text("output", "outputs", "A .png (castle.png; several: castle-000.png …), a folder (files are "
         "named by prompt and seed), or a pattern of {prompt}, {seed}, {index}: 'o/{prompt}-{index}.png'.")  # fmt: skip
    switch("grid", "Also write all pictures on one sheet (…grid.png): one row a prompt, or one for each of the "
           "last alternatives of a --matrix; near to a square with one picture a prompt.")  # fmt: skip
    switch("preview", "Also write how each picture came about, as a strip (…-preview.png).")
    text("preview_vae", None, "A tiny autoencoder (TAESD) that draws the strip in place of the model's.")
    text("cache_dir", None, "Folder of compiled programs; default: jaxdiff in your cache folder.")
    switch("verbose", "Show the traceback of an error.")
    flags.DEFINE_bool("help", False, "Show this help.", f, short_name="h")
    return f


NEEDS = {  # flags that mean something with another one only
    "strength": "image",
    "mask": "image",
    "outpaint": "image",
    "negative_prompt_2": "negative_prompt",
    "styles_file": "style",
    "variation_strength": "variation_seed",
    "hires_strength": "hires",
    "hires_upscale": "hires",
    "preview_vae": "preview",
    "blend_negative_prompt": "blend_prompt",
    "blend": "blend_prompt",
    "controlnet": "control_image",
    "controlnet_scale": "control_image",
    "control_edges": "control_image",
}


def is_given(value: Any) -> bool:
    """Whether a flag was given or has a default: not None, an empty list or a switch that is off."""
    return value is not None and value is not False and value != []


def read(f: flags.FlagValues, argv: list[str], hint: str) -> flags.FlagValues:
    """The same flags with the values of a command line. Raises UsageError; `hint` is for words that are no flags."""
    try:
        rest = f(argv)[1:]
    except flags.Error as e:
        raise UsageError(f"{e}; --help shows all flags.") from None
    if rest and not f.help:
        raise UsageError(f"{rest[0]!r} belongs to no flag: {hint}.")
    return f


def parse(argv: list[str]) -> flags.FlagValues:
    """Flags of a command line, checked as far as that goes without the model. Raises UsageError."""
    f = read(define(), argv, "put each prompt in quotes after its own --prompt")
    if f.help:
        return f
    if not f.prompt and not f.prompts_file:
        raise UsageError('--prompt is missing: say what to draw, such as --prompt "a castle".')
    for name, needed in NEEDS.items():
        if f[name].present and not is_given(f[needed].value):
            raise UsageError(f"--{name} goes with --{needed}: give that too, or leave --{name} out.")
    for name, value in f.flag_values_dict().items():
        numeric = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)]
        if not all(map(math.isfinite, numeric)):
            raise UsageError(f"--{name} {value} must be finite.")
    for given in f.lora:
        weighted(given)
    f["guidance_interval"].value = numbers(f, "guidance_interval", 2, float)
    try:
        as_interval(f.guidance_interval)
    except ValueError as e:
        raise UsageError(f"--{e}") from None
    f["outpaint"].value = numbers(f, "outpaint", 4, int)
    check_tasks(f)
    return f


def weighted(given: str) -> tuple[str, float]:
    """path:0.8, as --lora has it, as a path and a weight; 1 where there is none. Raises UsageError."""
    path, _, number = given.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return given, 1.0
    if not path:
        return given, 1.0
    if not math.isfinite(weight):
        raise UsageError(f"--lora {given}: the weight {number} must be finite, such as {path}:0.8.")
    return path, weight


def numbers(f: flags.FlagValues, name: str, count: int, kind: type) -> tuple | None:
    """A flag's list as so many numbers, none below 0."""
    given: list[str] | None = f[name].value
    if given is None:
        return None
    try:
        values = tuple(kind(v) for v in given)
        if len(values) != count or not all(v >= 0 for v in values):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--{name} {','.join(given)} must be {count} numbers, none below 0, with commas between."
        ) from None
    return values


def check_model(f: flags.FlagValues, model: Any) -> None:
    """Raise UsageError for flags that mean nothing to this model."""
    upscales, distilled = model.family == "upscaler", model.unet.config.time_cond_proj_dim is not None
    if f["noise_level"].present and not upscales:
        raise UsageError("--noise_level is for upscaling models, which this one is not: leave it out.")
    if f["strength"].present and upscales:
        raise UsageError("--strength is for images that are redrawn, and this model enlarges them: leave it out.")
    for name in ("negative_prompt", "negative_prompt_2", "guidance_rescale", "guidance_interval"):
        if distilled and f[name].present:
            raise UsageError(f"--{name} is for guidance, which this model was distilled to do without: leave it out.")


def check_tasks(f: flags.FlagValues) -> None:
    """Raise UsageError for flags that do not go together."""
    if f.mask is not None and f.outpaint is not None:
        raise UsageError("--mask and --outpaint both say what is drawn: give one of them.")
    for name in ("variation_seed", "blend_prompt"):
        if f.interpolate is not None and f[name].value is not None:
            raise UsageError(f"--interpolate goes from picture to picture by itself: leave out --{name}.")
    if f.controlnet and len(f.control_image) != len(f.controlnet):  # else the model's own are meant
        raise UsageError(f"{len(f.controlnet)} --controlnet and {len(f.control_image)} --control_image: one for each.")
    if f.controlnet_scale and len(f.controlnet_scale) != len(f.control_image):
        raise UsageError(f"{len(f.controlnet_scale)} --controlnet_scale for {len(f.control_image)} --control_image.")
