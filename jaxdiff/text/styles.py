"""Style presets: named prompt templates. The package's own are in styles.json in this folder."""

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.errors import say_once
from jaxdiff.text.prompt_files import PromptError, read_lines

EXPECTED_FORM = 'must be a JSON object of styles, {"name": {"prompt": "…"}}.'
STYLES_FILE = Path(__file__).with_name("styles.json")


class Style(NamedTuple):
    """Words to put around the user's: at "{prompt}", or before the style's words if that is missing."""

    prompt: str = ""
    negative_prompt: str = ""


def read_styles(path: str | Path | None = None) -> dict[str, Style]:
    """The styles of a file by name; None reads the package's own.

    A JSON file is an object {name: {"prompt": "{prompt}, watercolor painting", "negative_prompt": "photo"}}, or a list
    of objects that also have a "name", like SDXL's style files; either prompt may be missing. A .csv file has columns
    of these names, like the AUTOMATIC1111 web UI's styles.csv.

    Raises:
        PromptError: the file is missing or not of this form; the message names it and the style.
    """
    path = STYLES_FILE if path is None else Path(path)
    text = "\n".join(read_lines(path, "styles file"))
    entries = _read_csv(path, text) if path.suffix.lower() == ".csv" else _read_json(path, text)
    styles: dict[str, Style] = {}
    for name, values in entries:
        if name in styles:
            raise PromptError(f"The styles file {path} has two styles {name!r}: rename one.")
        styles[name] = _style(path, name, values)
    if not styles:
        raise PromptError(f"The styles file {path} {EXPECTED_FORM}")
    return styles


def _read_json(path: Path, text: str) -> list[tuple[str, Any]]:
    """Names and values of a JSON file."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise PromptError(f"The styles file {path} is not JSON ({e}).") from None
    if isinstance(values, list) and all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in values):
        return [(v["name"], {key: x for key, x in v.items() if key != "name"}) for v in values]
    if not isinstance(values, dict):
        raise PromptError(f"The styles file {path} {EXPECTED_FORM}")
    return list(values.items())


def _read_csv(path: Path, text: str) -> list[tuple[str, Any]]:
    """Names and values of a table; other columns are named in a warning."""
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as e:
        raise PromptError(f"The styles file {path} is not a CSV table ({e}).") from None
    columns = {column for row in rows for column in row if column}
    if not rows or not {"name", "prompt"} <= columns:
        raise PromptError(f"The styles file {path} must be a table with the columns name, prompt and negative_prompt.")
    if unused := sorted(columns - {"name", *Style._fields}):
        say_once(f"{path}: the column {unused[0]} is not used by styles and is ignored.")
    return [(row["name"], {key: row.get(key) or "" for key in Style._fields}) for row in rows if row["name"]]


def _style(path: Path, name: str, values: object) -> Style:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise PromptError(f'The style {name!r} of {path} must be an object of texts, {{"prompt": "{{prompt}}, …"}}.')
    if unknown := set(values) - set(Style._fields):
        raise PromptError(
            f"The style {name!r} of {path} has the key {min(unknown)!r}; known are {', '.join(Style._fields)}."
        )
    return Style(**values)


def _combine(style: str, words: str) -> str:
    """The user's words with a style's around them."""
    if "{prompt}" in style and words:
        return style.replace("{prompt}", words)
    style = style.replace("{prompt}", "").strip(" ,")
    return ", ".join(text for text in (words, style) if text)


def apply_style(
    prompt: str, negative_prompt: str | None, name: str, path: str | Path | None = None
) -> tuple[str, str | None]:
    """A prompt and its negative prompt with a style's words around them.

    Args:
        prompt: see `Style`.
        negative_prompt: the same; None stays None if the style has none.
        name: of the style.
        path: a styles file; None: the package's own.

    Raises:
        PromptError: the style is unknown (the message lists the known ones), or the file cannot be used.

    >>> apply_style("a castle", "blurry", "line-art")[1]
    'blurry, colour, shading, grey tones, photo, texture'
    """
    styles = read_styles(path)
    if name not in styles:
        raise PromptError(f"The style {name!r} is unknown; known are {', '.join(sorted(styles))}.")
    style = styles[name]
    return _combine(style.prompt, prompt), _combine(style.negative_prompt, negative_prompt or "") or negative_prompt
