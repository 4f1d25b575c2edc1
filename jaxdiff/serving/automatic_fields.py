"""The fields of AUTOMATIC1111's txt2img and img2img, and their translation to requests."""

import secrets
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from jaxdiff.data.images import BLACK, WHITE, on_background
from jaxdiff.errors import ArgumentError
from jaxdiff.sampling.resolve import is_guided
from jaxdiff.serving import uploads
from jaxdiff.serving.requests import DrawRequest
from jaxdiff.serving.service import Service
from jaxdiff.text.infotext import sampler_of
from jaxdiff.typing import SEEDS

UPSCALERS = {"latent": "latent", "latent (bicubic)": "latent", "lanczos": "pixel"}
# Fields without effect here -> values that have no effect in the web UI either; other values cause a warning.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "eta": (None, 1.0),
    "s_churn": (None, 0),
    "s_tmin": (None, 0),
    "s_tmax": (None, 0),
    "s_noise": (None, 1),
    "s_min_uncond": (None, 0),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "hr_second_pass_steps": (0,),
    "initial_noise_multiplier": (None, 1),
    "mask_blur": (None, 0),
    "inpainting_fill": (1,),
    "inpaint_full_res": (False,),
    "save_images": (False,),
}
ONLY_WITH_MASK = ("mask_blur", "inpainting_fill", "inpaint_full_res")
# Fields that change the image in the web UI, refused here unless they are empty.
REFUSED = ("restore_faces", "tiling", "script_name", "refiner_checkpoint", "hr_checkpoint_name", "hr_sampler_name",
           "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_resize_x", "hr_resize_y", "controlnet_units",
           "latent_mask")  # fmt: skip
# Fields that do not affect the image.
IGNORED = ("image_cfg_scale", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards",
          "script_args", "include_init_images", "inpaint_full_res_padding", "refiner_switch_at", "comments",
          "disable_extra_networks", "force_task_id", "infotext", "hr_scale", "hr_upscaler")  # fmt: skip
CONTROLNET = "controlnet"  # the script's name, in lower case
FULL_RANGE = {"guidance_start": 0, "guidance_end": 1}  # of a ControlNet's unit: all steps
MAX_CHARACTERS = 32_000  # of a prompt


class TextToImage(BaseModel):
    """The body of txt2img. The web UI's other fields are checked by the tables of this file."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field("", max_length=MAX_CHARACTERS)
    negative_prompt: str | None = Field("", max_length=MAX_CHARACTERS)
    styles: list[str] | None = Field(None, max_length=10)
    seed: int | None = Field(-1, ge=-1, lt=SEEDS)
    subseed: int | None = Field(-1, ge=-1, lt=SEEDS)
    subseed_strength: float | None = Field(0.0, ge=0, le=1)
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field(None, max_length=100)
    scheduler: str | None = Field(None, max_length=100)
    batch_size: int = Field(1, ge=1, le=1000)
    n_iter: int = Field(1, ge=1, le=1000)
    steps: int | None = Field(None, ge=1, le=10_000)
    cfg_scale: float | None = Field(None, ge=0, le=1000)
    width: int | None = Field(None, ge=1, le=100_000)
    height: int | None = Field(None, ge=1, le=100_000)
    denoising_strength: float | None = Field(None, ge=0, le=1)
    enable_hr: bool = False
    hr_scale: float = Field(2.0, gt=1, le=8)
    hr_upscaler: str | None = Field("Latent", max_length=100)
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True


class ImageToImage(TextToImage):
    """The body of img2img."""

    init_images: list[str] = Field(max_length=8)
    resize_mode: int = Field(0, ge=0, le=3)
    mask: str | None = None
    inpainting_mask_invert: int = Field(0, ge=0, le=1)


def draw_request(service: Service, body: TextToImage) -> tuple[DrawRequest, list[str]]:
    """The request to the engine, and warnings of fields without effect. Raises ArgumentError."""
    options = dict(body.override_settings or {})
    clip_skip = options.pop("CLIP_stop_at_last_layers", 1)
    check_options(service, options)
    if not isinstance(clip_skip, int) or not 1 <= clip_skip <= 12:
        raise ArgumentError("CLIP_stop_at_last_layers", "must be a whole number from 1 to 12.")
    warnings = check_fields(body)
    prompt, negative = body.prompt, body.negative_prompt or None
    for style in body.styles or ():
        prompt, negative = service.apply_style(prompt, negative, style)
    scheduler, spacing = sampler_of(body.sampler_name or body.sampler_index, body.scheduler)
    scale = body.hr_scale if body.enable_hr else 1
    width, height = (None if side is None else round(side * scale) for side in (body.width, body.height))
    width, height = service.engine.resolver.size(width, height)
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative,
        "n": body.batch_size * body.n_iter,
        "seed": None if body.seed in (None, -1) else body.seed,
        "steps": body.steps or service.steps,
        "guidance_scale": body.cfg_scale,
        "scheduler": scheduler,
        "spacing": spacing,
        "width": width,
        "height": height,
        "clip_skip": clip_skip - 1,
    }
    if body.subseed_strength:
        arguments["variation_seed"] = secrets.randbelow(SEEDS) if body.subseed in (None, -1) else body.subseed
        arguments["variation_strength"] = body.subseed_strength
    if body.enable_hr:
        known = UPSCALERS | ({} if service.upscaler is None else {service.upscaler.lower(): "network"})
        upscale = known.get((body.hr_upscaler or "Latent").lower())
        if upscale is None:
            raise ArgumentError("hr_upscaler", f"{body.hr_upscaler!r} is not available; known are {', '.join(known)}.")
        strength = 0.7 if body.denoising_strength is None else body.denoising_strength
        arguments |= {"hires": body.hr_scale, "hires_strength": strength, "hires_upscale": upscale}
    if isinstance(body, ImageToImage):
        arguments |= image_arguments(service, body, width, height)
    arguments |= control_arguments(service, body, width, height)
    model = service.engine.model
    guidance_scale = model.options.guidance_scale if body.cfg_scale is None else body.cfg_scale
    if negative and not is_guided(model, guidance_scale):
        warnings.append("negative_prompt has no effect here: it is for guidance, which is off.")
    return DrawRequest(**arguments), warnings


def check_fields(body: TextToImage) -> list[str]:
    """Warnings of fields that have no effect here. Raises ArgumentError for those that are refused."""
    extra = body.model_extra or {}
    masked = getattr(body, "mask", None) is not None
    for name in REFUSED:
        if extra.get(name):
            raise ArgumentError(name, "is not supported: leave it out.")
    for name, script in (body.alwayson_scripts or {}).items():
        args = script.get("args") if isinstance(script, dict) else script
        if args and args != [False] and name.lower() != CONTROLNET:
            raise ArgumentError(
                "alwayson_scripts", f"names {name[:60]!r}, but scripts are not supported: leave it out."
            )
    warnings = []
    for name, value in extra.items():
        if name in REFUSED or name in IGNORED or (name in ONLY_WITH_MASK and not masked):
            continue
        if name not in WITHOUT_EFFECT:
            warnings.append(f"{name[:60]} is unknown here.")
        elif value not in WITHOUT_EFFECT[name]:
            warnings.append(f"{name} has no effect here.")
    return warnings[:20]


def check_options(service: Service, options: dict[str, Any]) -> None:
    """Raise ArgumentError for options that would change something. The model may be named, as it is."""
    for name, value in options.items():
        if name == "sd_model_checkpoint" and value in (None, "", service.name):
            continue
        if name == "sd_model_checkpoint":
            raise ArgumentError(name, f"{str(value)[:60]!r} is not available: this server draws with {service.name!r}.")
        raise ArgumentError(name[:60], "cannot be set here: leave it out.")


def image_arguments(service: Service, body: ImageToImage, width: int, height: int) -> dict[str, Any]:
    """The image that is redrawn, and the mask. Raises ArgumentError."""
    if len(body.init_images) != 1:
        raise ArgumentError("init_images", f"must be one image, and {len(body.init_images)} came.")
    if body.resize_mode > 1:
        raise ArgumentError("resize_mode", f"{body.resize_mode} is not supported: 0 stretches, 1 cuts at the centre.")

    def read(name: str, text: str, background: tuple[int, int, int]) -> np.ndarray:
        upload = uploads.open_upload(name, uploads.from_base64(name, text), service.pixels)
        image = on_background(upload, background)  # black for a mask, so that its transparent areas are kept
        if body.resize_mode == 0:
            return np.array(image.resize((width, height), Image.Resampling.LANCZOS))
        return uploads.as_image(image, width, height)

    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    arguments: dict[str, Any] = {"image": read("init_images", body.init_images[0], WHITE), "strength": strength}
    if body.mask is not None:
        mask = read("mask", body.mask, BLACK).mean(-1) >= 127.5
        arguments["mask"] = ~mask if body.inpainting_mask_invert else mask
    return arguments


def control_arguments(service: Service, body: TextToImage, width: int, height: int) -> dict[str, Any]:
    """The images that ControlNets follow, and their weights. Raises ArgumentError."""
    scripts = {name.lower(): script for name, script in (body.alwayson_scripts or {}).items()}
    script = scripts.get(CONTROLNET)
    units = script.get("args") if isinstance(script, dict) else None
    if not units:
        return {}
    if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
        raise ArgumentError("alwayson_scripts", "must hold a list of units as the args of controlnet.")
    images, weights = [], []
    for unit in units:
        if not unit.get("enabled", True):
            continue
        image, module, weight = unit.get("image"), str(unit.get("module") or "none").lower(), unit.get("weight", 1.0)
        text = image.get("image") if isinstance(image, dict) else image
        if not isinstance(text, str) or not text:
            raise ArgumentError("controlnet.image", "is missing: send an image for each unit.")
        if module not in ("none", "canny"):
            raise ArgumentError("controlnet.module", f"{module[:60]!r} is not supported; known are none and canny.")
        if not isinstance(weight, int | float) or not 0 <= weight <= 2:
            raise ArgumentError("controlnet.weight", "must be a number from 0 to 2.")
        for name, value in FULL_RANGE.items():
            if unit.get(name, value) != value:
                raise ArgumentError(f"controlnet.{name}", f"must be {value}: ControlNets count at all steps here.")
        upload = uploads.open_upload("controlnet.image", uploads.from_base64("controlnet.image", text), service.pixels)
        hint = uploads.as_image(upload, width, height, WHITE if module == "canny" else BLACK)
        images.append(edges(hint, unit) if module == "canny" else hint)
        weights.append(float(weight))
    return {"control_images": tuple(images), "controlnet_scale": tuple(weights)} if images else {}


def edges(image: np.ndarray, unit: dict[str, Any]) -> np.ndarray:
    """The edges of an image, with a unit's thresholds where it has any. Raises ArgumentError."""
    thresholds = [
        x for x in (unit.get("threshold_a"), unit.get("threshold_b")) if isinstance(x, int | float) and x >= 0
    ]
    return uploads.edges("controlnet.threshold_a", image, *(thresholds if len(thresholds) == 2 else ()))
