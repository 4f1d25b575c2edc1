"""The flags of `jaxdiff-serve` in one table, with all checks that need no model.

python -m jaxdiff.cli.serve_options > docs/serve-flags.md
"""

import os
import re

from absl import flags

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import check_finite, check_paths, parse_lora, read
from jaxdiff.cli.options import OPTIONS, Option, define, document, integer, number, text, texts

INTRODUCTION = """# Flags of the server

The flags of `jaxdiff-serve`, or `python -m jaxdiff.cli.serve`; [serving.md](serving.md) says how to use it. Flags
marked … may be repeated.

| flag | default | meaning |
|---|---|---|
"""
FROM_SAMPLE = ("model", "prediction_type", "lora", "lora_dir", "embedding", "vae", "transformer", "dtype")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "JAXDIFF_API_KEY"

SECTIONS: dict[str, tuple[Option, ...]] = {
    "model": (
        *(OPTIONS[name] for name in FROM_SAMPLE),
        texts("controlnet", "run", "A ControlNet's folder or file; requests may send its image.", path="old"),
        text("preview_vae", "run", "A tiny autoencoder (TAESD) to decode previews instead of the model's.",
             path="old"),
        text("upscaler", "run", "The network that enlarges: a .pth or .safetensors file in Real-ESRGAN's layout, a "
             "folder that training exported, or the name of a bundled one; none: no network.", "icons", path="any"),
        text("model_name", "run", "Name of the model in the APIs.", default_text="the end of --model"),
    ),
    "images": (
        text("sizes", "run", "Sizes that requests may ask for, such as 512x512,768x512: width x height in pixels; the "
             "first is the default. Each is compiled separately.",
             default_text="the model's own, and others of as many pixels"),
        integer("steps", "run", "Default steps of a request.", default_text="the model's, else 25"),
        integer("max_steps", "run", "Maximum steps of a request.", 150),
        integer("max_images", "run", "Maximum images of a request.", 10),
    ),
    "server": (
        text("host", "run", "Address to listen on. Any but this machine's own needs an API key.", "127.0.0.1"),
        integer("port", "run", "Port to listen on; 0 takes a free one.", 7860, 0, high=65535),
        text("api_key", "run", f"Key that every request must send. Set the variable {KEY} instead if others can read "
             "command lines.", default_text=f"{KEY}, else none"),
        integer("batch_size", "run", "Maximum images drawn at once.", default_text="at most 4 a device"),
        integer("window_ms", "run", "Milliseconds that an image waits for others to share its batch.", 20, 0),
        integer("queue", "run", "Maximum images that wait; further requests are refused (429).", 64),
        integer("programs", "run", "Maximum programs compiled within an hour; requests for another size, scheduler or "
                "the like are then refused (429).", 40),
        number("time_limit", "run", "Maximum seconds that a client waits for its images.", 600.0, low=1.0),
        integer("max_body_mb", "run", "Maximum megabytes of a request.", 32),
        *(OPTIONS[name] for name in ("fsdp", "tensor", "cache_dir", "verbose")),
    ),
}  # fmt: skip
ALL: dict[str, Option] = {option.name: option for options in SECTIONS.values() for option in options}


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line, with all checks that do not need the model. Raises UsageError."""
    f = read(define(ALL), argv, "--help shows all flags")
    if f.help:
        return f
    check_finite(f)
    check_paths(f, ALL)
    for given in f.lora:
        parse_lora(given)
    parse_sizes(f)
    if f.api_key is None:
        f["api_key"].value = os.environ.get(KEY) or None
    if f.api_key is not None and len(f.api_key) < 8:
        raise UsageError(f"--api_key has {len(f.api_key)} characters: take at least 8, at random.")
    if f.api_key is None and f.host not in LOOPBACK:
        raise UsageError(f"--host {f.host} lets other machines in: give an --api_key too, or leave --host out.")
    if f.steps is not None and f.steps > f.max_steps:
        raise UsageError(f"--steps {f.steps} is above --max_steps {f.max_steps}: lower it.")
    return f


def parse_sizes(f: flags.FlagValues) -> tuple[tuple[int, int], ...]:
    """The sizes of --sizes; none where it is not given. Raises UsageError."""
    sizes: list[tuple[int, int]] = []
    for size in f.sizes.split(",") if f.sizes is not None else ():
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", size)
        if match is None:
            raise UsageError(f"--sizes {f.sizes}: write width x height with commas between, such as 512x512,768x512.")
        sizes.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(sizes))


def flags_document() -> str:
    """docs/serve-flags.md."""
    return document(INTRODUCTION, SECTIONS)


if __name__ == "__main__":
    print(flags_document(), end="")
