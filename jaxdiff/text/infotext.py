"""Reads the generation parameters ("infotext") that the AUTOMATIC1111 web UI writes into its images.

The text holds the prompt, "Negative prompt: …", and a last line of settings: "Steps: 20, Sampler: Euler a,
Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, Clip skip: 2".
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.errors import ArgumentError

SAMPLERS = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "Euler a": "euler_ancestral",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
    "TCD": "tcd",
}
SCHEDULERS = {  # the web UI's "schedule type" -> (its label, our spacing)
    "automatic": ("Automatic", None),
    "uniform": ("Uniform", "linspace"),
    "karras": ("Karras", "karras"),
    "exponential": ("Exponential", "exponential"),
    "beta": ("Beta", "beta"),
    "align_your_steps": ("Align Your Steps", "ays"),
}
NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
MIN_SETTINGS = 3  # settings: a last line with fewer belongs to the prompt, as in the web UI
# Settings that do not affect the image, in lower case.
_IGNORED = re.compile(r"version|.*hash(es)?|user|created at|script|schedule type|hires (upscale|upscaler|steps)")


def sampler_of(name: str | None, spacing: str | None = None) -> tuple[str | None, str | None]:
    """Our scheduler and spacing for a sampler of the web UI; "DPM++ 2M Karras", as in older versions, names both.

    >>> sampler_of("DPM++ 2M Karras"), sampler_of("euler", "Beta"), sampler_of(None)
    (('dpmpp_2m', 'karras'), ('euler', 'beta'), (None, None))

    Raises:
        ArgumentError: one of them is unknown.
    """
    if name is None or name.lower() == "automatic":
        return None, spacing_of(spacing or "automatic")
    known = {key.lower(): value for key, value in SAMPLERS.items()} | {value: value for value in SAMPLERS.values()}
    if name.lower() not in known and " " in name:
        head, _, tail = name.rpartition(" ")
        if head.lower() in known and tail.lower() in SCHEDULERS:
            name = head
            spacing = tail if (spacing or "automatic").lower() == "automatic" else spacing
    if name.lower() not in known:
        raise ArgumentError("sampler_name", f"{name!r} is unknown; known are {', '.join(SAMPLERS)}.")
    return known[name.lower()], spacing_of(spacing or "automatic")


def spacing_of(name: str) -> str | None:
    """Our spacing for a schedule type of the web UI. Raises ArgumentError."""
    spacings = {label.lower(): value for label, value in SCHEDULERS.values()}
    spacings |= {key: value for key, (_, value) in SCHEDULERS.items()}
    if name.lower() not in spacings:
        raise ArgumentError("scheduler", f"{name!r} is unknown; known are {', '.join(SCHEDULERS)}.")
    return spacings[name.lower()]


def read_infotext(text: str) -> tuple[dict[str, Any], list[str]]:
    """The flags of sample.py that an infotext stands for, and its settings without a flag, as they are written.

    Both are empty if the text has no last line of settings.

    >>> read_infotext("a cat\\nNegative prompt: dog\\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 5, Model: toon")
    ({'prompt': ['a cat'], 'negative_prompt': 'dog', 'steps': 20, 'scheduler': 'ddim', 'guidance_scale': 7.0, 'seed': 5}, ['Model: toon'])
    """  # noqa: E501
    *lines, last = text.strip().split("\n")
    settings = {name.strip().lower(): (name.strip(), value.strip()) for name, value in _SETTING.findall(last)}
    if len(settings) < MIN_SETTINGS:
        return {}, []
    negative_start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    flags: dict[str, Any] = {"prompt": ["\n".join(lines[:negative_start]).strip()]}
    if negative_prompt := "\n".join(lines[negative_start:]).removeprefix(NEGATIVE).strip():
        flags["negative_prompt"] = negative_prompt
    unsupported = []
    for key, (name, value) in settings.items():
        try:
            setting_flags = _setting_flags(key, value, settings)
        except (ArgumentError, ValueError):
            setting_flags = None
        if setting_flags is not None:
            flags |= setting_flags
        elif not _IGNORED.fullmatch(key):
            unsupported.append(f"{name}: {value}")
    return flags, unsupported


def _setting_flags(key: str, value: str, settings: Mapping[str, tuple[str, str]]) -> dict[str, Any] | None:
    """The flags for one setting; None if it has none. Raises ValueError or ArgumentError for an unknown value."""
    upscale = re.fullmatch(r"\d{1,2}(\.\d+)?", settings.get("hires upscale", ("", "1"))[1])
    hires = float(upscale[0]) if upscale else 1.0
    if key == "steps":
        return {"steps": int(value)}
    if key == "sampler":
        scheduler, spacing = sampler_of(value, settings.get("schedule type", ("", "automatic"))[1])
        return {"scheduler": scheduler} | ({"spacing": spacing} if spacing else {})
    if key == "cfg scale":
        return {"guidance_scale": float(value)}
    if key == "seed":
        return {"seed": int(value)}
    if key == "size":
        width, height = (8 * round(int(side) * hires / 8) for side in value.split("x"))
        size = {"width": width, "height": height}
        return size if hires <= 1 else size | {"hires": hires}
    if key == "clip skip":  # 1 in the web UI skips no layer
        return {"clip_skip": int(value) - 1}
    if key == "denoising strength" and hires > 1:
        latent = settings.get("hires upscaler", ("", ""))[1].lower().startswith("latent")
        return {"hires_strength": float(value), "hires_upscale": "latent" if latent else "pixel"}
    if key == "variation seed":
        return {"variation_seed": int(value)}
    if key == "variation seed strength":
        return {"variation_strength": float(value)}
    return None
