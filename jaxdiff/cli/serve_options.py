"""The flags of `jaxdiff-serve` in one table, with all checks that need no model.

python -m jaxdiff.cli.serve_options > docs/serve-flags.md
"""

import os
import re

from absl import flags

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import check_finite, check_paths, read, weighted
from jaxdiff.cli.options import OPTIONS, Option, define, document, number, text, texts, whole

INTRODUCTION = """# Flags of the server

The flags of `jaxdiff-serve`, which is `python -m jaxdiff.cli.serve`; [serving.md](serving.md) says how it is used.
Flags marked … may be given again for more.

| flag | default | meaning |
|---|---|---|
"""
FROM_SAMPLE = ("model", "prediction_type", "lora", "lora_dir", "embedding", "vae", "transformer", "dtype")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "JAXDIFF_API_KEY"

SECTIONS: dict[str, tuple[Option, ...]] = {
    "model": (
        *(OPTIONS[name] for name in FROM_SAMPLE),
        texts("controlnet", "run", "A ControlNet, a folder or file, whose image requests may send.", path="old"),
        text("preview_vae", "run", "A tiny autoencoder (TAESD) that draws previews in place of the model's.",
             path="old"),
        text("upscaler", "run", "The network that enlarges: a .pth or .safetensors file in Real-ESRGAN's layout, a "
             "folder that training exported, or the name of a bundled one; none does without.", "icons", path="any"),
        text("model_name", "run", "What the APIs call the model.", without="the end of --model"),
    ),
    "images": (
        text("sizes", "run", "Sizes that may be asked for, 512x512,768x512: width x height in pixels, the first one "
             "by default. Each is compiled for.", without="the model's own, and others of as many pixels"),
        whole("steps", "run", "Steps where a request names none.", 25),
        whole("max_steps", "run", "Steps that a request may ask for.", 150),
        whole("max_images", "run", "Images that a request may ask for.", 10),
    ),
    "server": (
        text("host", "run", "Address to listen on. Others than this machine's own need an API key.", "127.0.0.1"),
        whole("port", "run", "Port to listen on; 0 takes a free one.", 7860, 0, high=65535),
        text("api_key", "run", f"Key that every request must send. The variable {KEY} holds it where others may read "
             "command lines.", without=f"{KEY}, else none"),
        whole("batch_size", "run", "Images drawn at once, at most.", without="at most 4 a device"),
        whole("window_ms", "run", "Milliseconds that an image waits for others to be drawn with.", 20, 0),
        whole("queue", "run", "Images that may wait; further requests are refused (429).", 64),
        whole("programs", "run", "Programs compiled within an hour, at most; requests for another size, scheduler or "
              "the like are then refused (429).", 40),
        number("time_limit", "run", "Seconds that a client waits for its images, at most.", 600.0, low=1.0),
        whole("max_body_mb", "run", "Megabytes of a request.", 32),
        *(OPTIONS[name] for name in ("fsdp", "tensor", "cache_dir", "verbose")),
    ),
}  # fmt: skip
ALL: dict[str, Option] = {option.name: option for options in SECTIONS.values() for option in options}


def parse(argv: list[str]) -> flags.FlagValues:
    """Flags of a command line, checked as far as that goes without the model. Raises UsageError."""
    f = read(define(ALL), argv, "--help shows all flags")
    if f.help:
        return f
    check_finite(f)
    check_paths(f, ALL)
    for given in f.lora:
        weighted(given)
    parsed_sizes(f)
    if f.api_key is None:
        f["api_key"].value = os.environ.get(KEY) or None
    if f.api_key is not None and len(f.api_key) < 8:
        raise UsageError(f"--api_key has {len(f.api_key)} characters: take at least 8, at random.")
    if f.api_key is None and f.host not in LOOPBACK:
        raise UsageError(f"--host {f.host} lets other machines in: give an --api_key too, or leave --host out.")
    if f.steps > f.max_steps:
        raise UsageError(f"--steps {f.steps} is above --max_steps {f.max_steps}: lower it.")
    return f


def parsed_sizes(f: flags.FlagValues) -> tuple[tuple[int, int], ...]:
    """The sizes of --sizes; none where it is not given. Raises UsageError."""
    found: list[tuple[int, int]] = []
    for size in f.sizes.split(",") if f.sizes is not None else ():
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", size)
        if match is None:
            raise UsageError(f"--sizes {f.sizes}: write width x height with commas between, such as 512x512,768x512.")
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def described() -> str:
    """docs/serve-flags.md."""
    return document(INTRODUCTION, SECTIONS)


if __name__ == "__main__":
    print(described(), end="")
