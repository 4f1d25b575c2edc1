"""Style presets: named templates of prompts. styles.json beside this file holds those of the package."""

import json
from pathlib import Path
from typing import NamedTuple

from jaxdiff.text.prompt_files import PromptError, read_lines

STYLES_FILE = Path(__file__).with_name("styles.json")


class Style(NamedTuple):
    prompt: str  # "{prompt}" stands for the user's words
    negative_prompt: str = ""  # is added to the user's


def read_styles(path: str | Path | None = None) -> dict[str, Style]:
    """The styles of a JSON file by name; None reads those of the package.

    The file is an object {name: {"prompt": "{prompt}, watercolor painting", "negative_prompt": "photo"}}; a style may
    omit either. Copy jaxdiff/text/styles.json and edit it.

    Raises:
        PromptError: the file is missing or not of this form; the message names it and the style.
    """
    path = STYLES_FILE if path is None else Path(path)
    text = "\n".join(read_lines(path, "styles file"))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise PromptError(f"The styles file {path} is not JSON ({e}).") from None
    if not isinstance(values, dict) or not values:
        raise PromptError(f'The styles file {path} must be a JSON object of styles, {{"name": {{"prompt": "…"}}}}.')
    return {name: _style(path, name, style) for name, style in values.items()}


def _style(path: Path, name: str, values: object) -> Style:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise PromptError(f'The style {name!r} of {path} must be an object of texts, {{"prompt": "{{prompt}}, …"}}.')
    if unknown := set(values) - set(Style._fields):
        raise PromptError(
            f"The style {name!r} of {path} has the key {min(unknown)!r}; known are {', '.join(Style._fields)}."
        )
    style = Style(**{"prompt": "{prompt}", **values})
    if "{prompt}" not in style.prompt:
        raise PromptError(f'The style {name!r} of {path} lacks "{{prompt}}", the place for the user\'s words.')
    return style


def apply_style(
    prompt: str, negative_prompt: str | None, name: str, path: str | Path | None = None
) -> tuple[str, str | None]:
    """A prompt and its negative prompt with a style's words around them.

    Args:
        prompt: replaces "{prompt}" in the style's template.
        negative_prompt: the style's is appended; None stays None if the style has none.
        name: of the style.
        path: of a JSON file of styles; None takes those of the package.

    Raises:
        PromptError: the style is unknown (the message lists the known ones), or the file cannot be used.

    >>> apply_style("a castle", "blurry", "line-art")[1]
    'blurry, colour, shading, grey tones, photo, texture'
    """
    styles = read_styles(path)
    if name not in styles:
        raise PromptError(f"The style {name!r} is unknown; known are {', '.join(sorted(styles))}.")
    style = styles[name]
    negative = ", ".join(text for text in (negative_prompt, style.negative_prompt) if text)
    return style.prompt.replace("{prompt}", prompt), negative or negative_prompt
