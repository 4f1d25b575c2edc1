"""The command line of sample.py: parsing, and all checks that need no weights."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags, logging

from jaxdiff import stores
from jaxdiff.cli import hosts
from jaxdiff.cli.errors import UsageError, file_errors
from jaxdiff.cli.options import FLAG_OF, OPTIONS, Option, define, is_given
from jaxdiff.errors import ArgumentError, ImageError
from jaxdiff.io.images import read_metadata, read_text
from jaxdiff.sampling.checks import as_interval
from jaxdiff.text.infotext import read_infotext


@contextlib.contextmanager
def flag_errors() -> Iterator[None]:
    """Turn errors of arguments into errors of the flags that set them."""
    try:
        yield
    except ArgumentError as e:
        raise UsageError(f"--{FLAG_OF.get(e.argument, e.argument)} {e.reason}") from None


def read(f: flags.FlagValues, argv: list[str], hint: str) -> flags.FlagValues:
    """Parse a command line into `f`. Raises UsageError, with `hint` for words that belong to no flag."""
    try:
        extra = f(argv)[1:]
    except flags.Error as e:
        raise UsageError(f"{e}; --help shows all flags.") from None
    if extra and not f.help:
        raise UsageError(f"{extra[0]!r} belongs to no flag: {hint}.")
    return f


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of a command line, with all checks that do not need the model.

    Raises:
        UsageError: wrong flags, or a file of --from_png that cannot be read or holds no flags.
    """
    hint = "put each prompt in quotes after its own --prompt"
    f = read(define(), argv, hint)
    if f.help:
        return f
    check_paths(f)
    if f.from_png is not None:
        if not os.path.exists(f.from_png):
            raise UsageError(f"--from_png: {f.from_png} does not exist: check the path.")
        with file_errors("--from_png"):
            recorded = flags_from_png(f)
        f = read(define(), [argv[0], *recorded, *argv[1:]], hint)
        check_paths(f)
    if not f.prompt and not f.prompts_file and f.upscale is None:
        raise UsageError('--prompt is missing: say what to draw, such as --prompt "a castle".')
    for option in OPTIONS.values():
        if option.needs and f[option.name].present and not is_given(f[option.needs].value):
            raise UsageError(
                f"--{option.name} goes with --{option.needs}: give that too, or leave --{option.name} out."
            )
    check_finite(f)
    for given in f.lora:
        parse_lora(given)
    for option in OPTIONS.values():
        if option.count:
            f[option.name].value = numbers(f, option.name, option.count, option.kind)
    with flag_errors():
        as_interval(f.guidance_interval)
    check_tasks(f)
    hosts.check(f)
    return f


def check_finite(f: flags.FlagValues) -> None:
    """Raise UsageError for numbers that are not finite."""
    for name, value in f.flag_values_dict().items():
        numeric = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)]
        if not all(map(math.isfinite, numeric)):
            raise UsageError(f"--{name} {value} must be finite.")


def flags_from_png(f: flags.FlagValues) -> list[str]:
    """The flags in the PNG of --from_png, without those on the command line."""
    values, unsupported = read_infotext(read_text(f.from_png))
    try:
        values = read_metadata(f.from_png)
    except ImageError:
        if not values:
            raise
        logging.warning(
            "%s is from the AUTOMATIC1111 web UI, which draws other noise from a seed: the image will differ.%s",
            *(f.from_png, f" Not followed: {', '.join(unsupported)}." if unsupported else ""),
        )
    if not isinstance(values, dict):
        raise UsageError(f"--from_png {f.from_png} is a sheet of several images: give the PNG of one.")
    arguments: list[str] = []
    for name, value in values.items():
        if name not in OPTIONS:
            raise UsageError(f"--from_png {f.from_png} holds {name}, which is not a flag: give the flags themselves.")
        if f[name].present or (name == "prompt" and f.prompts_file is not None):
            continue
        if OPTIONS[name].count:
            if not isinstance(value, list):
                raise UsageError(
                    f"--from_png {f.from_png} holds {name}: {value!r}, not a list: give the flags themselves."
                )
            value = ",".join(map(str, value))
        arguments += [f"--{name}={x}" for x in (value if isinstance(value, list) else [value])]
    return arguments


LONGEST_NAME = 255  # bytes, on all common file systems


def at_home(path: str) -> str:
    """A path, or token=path, with a leading ~ replaced by the home folder."""
    return re.sub(r"(?:^|(?<==))~[^/]*", lambda home: os.path.expanduser(home[0]), path, count=1)


def check_paths(f: flags.FlagValues, options: Mapping[str, Option] = OPTIONS) -> None:
    """Replace ~ in all flags that take a path. Raises UsageError for a wrong path."""
    for name in (option.name for option in options.values() if option.path):
        value = f[name].value
        if isinstance(value, list):
            f[name].value = [at_home(path) for path in value]
        elif value is not None:
            f[name].value = at_home(value)
        for path in value if isinstance(value, list) else [] if value is None else [value]:
            check_path(f"--{name}", path, stored=options[name].stored)
    if "output" in options and stores.is_store(f.output):  # files written there are uploaded
        f["output"].value = str(stores.place(f.output, stores.OUTPUTS))


def check_path(flag: str, path: str, stored: bool = False) -> None:
    """Raise UsageError for a path that is empty or too long, or, unless `stored`, at an object store."""
    if not path.strip() or "\0" in path:
        raise UsageError(f"{flag}={path!r} is not a path: name a file or folder, or leave {flag} out.")
    if reason := stores.wrong(path):
        raise UsageError(f"{flag}={path} {reason}")
    if stores.is_store(path) and not stored:
        raise UsageError(f"{flag}={path}: this flag takes only paths on this machine: copy it here first.")
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > LONGEST_NAME:
        raise UsageError(f"{flag} {path:.40}… has a name of {longest} bytes, above {LONGEST_NAME}: shorten it.")


def check_files(f: flags.FlagValues, options: Mapping[str, Option] = OPTIONS) -> None:
    """Raise UsageError for a flag that names a missing file or folder."""
    parsers = {"lora": lambda given: parse_lora(given)[0], "embedding": lambda given: parse_embedding(given)[0]}
    for name, option in options.items():
        value = f[name].value
        if option.path != "old" or not value:
            continue
        for argument in value if option.many else [value]:
            path = parsers.get(name, str)(argument)
            if not os.path.exists(path):
                weight = ", and write the weight as a number, path:0.8" if name == "lora" and ":" in path else ""
                raise UsageError(f"--{name}: {path} does not exist: check the path{weight}.")


def parse_embedding(value: str) -> tuple[str, str | None]:
    """(path, token) of token=path; the token is None if there is none. A path may contain = itself."""
    token, equals, path = value.partition("=")
    return (path, token) if equals and "/" not in token and not os.path.exists(value) else (value, None)


def parse_lora(value: str) -> tuple[str, float]:
    """(path, weight) of a --lora value such as path:0.8; the weight defaults to 1. Raises UsageError."""
    path, _, number = value.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return value, 1.0
    if not path:
        return value, 1.0
    if not math.isfinite(weight):
        raise UsageError(f"--lora {value}: the weight {number} must be finite, such as {path}:0.8.")
    return path, weight


def numbers(f: flags.FlagValues, name: str, count: int, kind: type) -> tuple | None:
    """The values of a list flag as `count` numbers of type `kind`, each at least 0. Raises UsageError."""
    strings: list[str] | None = f[name].value
    if strings is None:
        return None
    try:
        values = tuple(kind(v) for v in strings)
        if len(values) != count or not all(v >= 0 for v in values):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--{name} {','.join(strings)} must be {count} numbers, none below 0, with commas between."
        ) from None
    return values


def check_unet(f: flags.FlagValues, model: Any) -> None:
    """Raise UsageError for flags that need a UNet if the model has none."""
    for name in ("controlnet", "embedding"):
        if f[name].value and (model.unet is None or (model.is_gan and name == "controlnet")):
            raise UsageError(f"--{name} is for models with a UNet, which this one lacks: leave it out.")


def check_model(f: flags.FlagValues, model: Any) -> None:
    """Raise UsageError for flags that have no effect on this model."""
    upscales = model.family == "upscaler"
    check_unet(f, model)
    if model.is_gan and f.preview:
        raise UsageError("--preview shows images as they form, and this model draws them at once: leave it out.")
    if f["noise_level"].present and not upscales:
        raise UsageError("--noise_level is for upscaling models, which this one is not: leave it out.")
    if f["strength"].present and upscales:
        raise UsageError("--strength is for images that are redrawn, and this model enlarges them: leave it out.")
    for name in ("prompt_2", "negative_prompt_2"):
        if f[name].present and model.tokenizer_2 is None:
            raise UsageError(f"--{name} is for the second text encoder of SDXL, which this model lacks: leave it out.")
    for name in ("negative_prompt", "negative_prompt_2", "guidance_rescale", "guidance_interval"):
        if model.one_pass and f[name].present:
            raise UsageError(f"--{name} is for guidance, which this model does without: leave it out.")
    if f["guidance_scale"].present and not (model.takes_guidance or model.is_gan):  # GANs refuse it later
        raise UsageError("--guidance_scale has no effect on this model, which was distilled with one: leave it out.")


# Flags that apply if images are only enlarged.
ENLARGING = ("image", "upscale", "upscaler", "upscale_tile", "dtype", "output", "overwrite", "cache_dir", "verbose",
             "from_png")  # fmt: skip


def check_upscale(f: flags.FlagValues) -> None:
    """Raise UsageError for flags that do not go with --upscale, or that need it."""
    network = f.hires is not None and f.hires_upscale == "network"
    if f["upscaler"].present and f.upscale is None and not network:
        raise UsageError(
            "--upscaler goes with --upscale, or with --hires and --hires_upscale=network: give one of these too, or "
            "leave --upscaler out."
        )
    if f.upscale is None or f.prompt or f.prompts_file:
        return
    if f.image is None:
        raise UsageError("--upscale enlarges what --prompt draws, or an --image: give one of the two.")
    for name in OPTIONS:
        if f[name].present and name not in ENLARGING:
            raise UsageError(
                f"--{name} is for images that are drawn, and without --prompt the --image is only enlarged: leave it "
                "out, or give --prompt."
            )


def check_tasks(f: flags.FlagValues) -> None:
    """Raise UsageError for flags that do not go together."""
    check_upscale(f)
    if f.lora_dir is not None and not f.emphasis:
        raise UsageError("--lora_dir is for <lora:…> in prompts, which --noemphasis reads as words: leave one out.")
    if f.mask is not None and f.outpaint is not None:
        raise UsageError("--mask and --outpaint both say what is drawn: give one of them.")
    for name in ("variation_seed", "blend_prompt"):
        if f.interpolate is not None and f[name].value is not None:
            raise UsageError(f"--interpolate sets --{name} itself: leave --{name} out.")
    if f.controlnet and len(f.control_image) != len(f.controlnet):  # without --controlnet, the model's own are used
        raise UsageError(f"{len(f.controlnet)} --controlnet and {len(f.control_image)} --control_image: one for each.")
    if f.controlnet_scale and len(f.controlnet_scale) != len(f.control_image):
        raise UsageError(f"{len(f.controlnet_scale)} --controlnet_scale for {len(f.control_image)} --control_image.")
