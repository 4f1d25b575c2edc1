"""Prompts from files: one a line, or one JSON object a line."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.errors import JaxdiffError
from jaxdiff.files import not_fetched
from jaxdiff.typing import SEEDS


class PromptError(JaxdiffError, ValueError):
    """A prompt, or a file of prompts, styles or wildcards, that cannot be used."""


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")  # in any letter case
OTHER_SUFFIXES = (".csv", ".tsv", ".xlsx", ".yaml", ".yml", ".toml")  # whose lines are no prompts

# Flags in a line, as in kohya's scripts and the AUTOMATIC1111 web UI -> our name for each.
LINE_FLAGS = {
    "n": "negative_prompt", "negative_prompt": "negative_prompt", "d": "seed", "seed": "seed", "prompt": "prompt",
}  # fmt: skip
GLOBAL_FLAGS = {  # flags that cannot differ by line -> our flag that sets it for all lines
    "w": "width", "width": "width", "h": "height", "height": "height", "s": "steps", "steps": "steps",
    "l": "guidance_scale", "cfg_scale": "guidance_scale", "g": "guidance_scale", "sampler_name": "scheduler",
    "ss": "scheduler", "batch_size": "num_images", "n_iter": "num_images",
}  # fmt: skip
_FLAG = re.compile(rf"(?:^|(?<=\s))--({'|'.join([*LINE_FLAGS, *GLOBAL_FLAGS])})(?=\s|$)")


class PromptLine(NamedTuple):
    """A line of a prompts file."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None


def read_prompts(path: str | Path) -> list[PromptLine]:
    """Prompts from a UTF-8 text file, one a line; lines that begin with # are comments.

    A line may end in "--n blurry --d 7", as in kohya's scripts, or be "--prompt … --negative_prompt … --seed 7", as in
    the AUTOMATIC1111 web UI. In a .jsonl, .ndjson or .json file each line is a JSON object with the keys of
    `PromptLine`.

    Raises:
        PromptError: the file is missing, not UTF-8 or without a prompt; or a line is empty (except at the end) or not
            of this form. The message names the file and the line.
    """
    path = Path(path)
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise PromptError(f"{path} is of a kind whose lines are no prompts: write one a line as .txt, or .jsonl.")
    parse = _parse_json if path.suffix.lower() in JSON_SUFFIXES else _parse_text
    prompts = []
    for number, line in enumerate(read_lines(path, "prompts file"), 1):
        if not line:
            raise PromptError(f"Line {number} of {path} is empty: write a prompt there, or delete the line.")
        if not line.startswith("#"):
            try:
                prompts.append(parse(line))
            except ValueError as e:
                raise PromptError(f"Line {number} of {path} {e}.") from None
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one a line.")
    return prompts


def read_lines(path: Path, kind: str) -> list[str]:
    """The lines of a UTF-8 file, stripped, without the empty ones at its end; `kind` names the file in errors."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"The {kind} {path} does not exist.") from None
    except UnicodeDecodeError as e:
        raise PromptError(f"The {kind} {path} is not UTF-8 text (byte {e.start}): save it as UTF-8.") from None
    except (OSError, ValueError) as e:
        raise PromptError(f"The {kind} {path} cannot be read ({e}).") from None
    if (reason := not_fetched(text[:200].encode())) is not None:
        raise PromptError(f"The {kind} {path} {reason}")
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def _parse_text(line: str) -> PromptLine:
    """One line of a text file; raises ValueError whose message continues "Line 3 of prompts.txt …"."""
    if re.match(r'\{\s*"\w+"\s*:', line):
        raise ValueError("is JSON: name the file .jsonl")
    text, *parts = _FLAG.split(line)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    values = {"prompt": text.strip()} if text.strip() else {}
    for name, value in pairs:
        if name in GLOBAL_FLAGS:
            raise ValueError(
                f"sets --{name}, which cannot differ by line: give --{GLOBAL_FLAGS[name]} on the command line instead"
            )
        key, value = LINE_FLAGS[name], value.strip()
        if key in values:
            raise ValueError(f"gives {key} twice")
        values[key] = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    if not values.get("prompt"):
        raise ValueError("holds no prompt")
    return _to_prompt_line({**values, "seed": _parse_seed(values["seed"])} if "seed" in values else values)


def _parse_seed(text: str) -> int | None:
    """A seed from text; -1, which means a random seed in other programs, is None."""
    if not re.fullmatch(r"-?\d{1,20}", text):
        raise ValueError(f"has the seed {text!r}, which is not a whole number")
    return None if int(text) == -1 else int(text)


def _parse_json(line: str) -> PromptLine:
    """One line of a .jsonl file; raises ValueError like `_parse_text`."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError('is not JSON: write {"prompt": "a castle", "negative_prompt": "blurry", "seed": 1}') from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise ValueError('is not a JSON object with a text under "prompt"')
    if unknown := set(values) - set(PromptLine._fields):
        raise ValueError(f"has the key {min(unknown)!r}; known are {', '.join(PromptLine._fields)}")
    return _to_prompt_line(values)


def _to_prompt_line(values: dict[str, Any]) -> PromptLine:
    if not isinstance(values.get("negative_prompt"), str | None):
        raise ValueError("has a negative_prompt that is not text")
    if type(values.get("seed")) not in (int, type(None)):
        raise ValueError("has a seed that is not a whole number")
    if not 0 <= (values.get("seed") or 0) < SEEDS:
        raise ValueError(f"has the seed {values['seed']}; seeds are from 0 to {SEEDS - 1}")
    return PromptLine(**values)
