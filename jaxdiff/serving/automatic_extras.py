"""AUTOMATIC1111's /sdapi/v1/extra-single-image: an image enlarged, by the network or by resampling."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from PIL import Image
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from jaxdiff.errors import ArgumentError
from jaxdiff.sampling.upscale import MAX_SCALE
from jaxdiff.serving import uploads
from jaxdiff.serving.service import Service, owner

LANCZOS = "lanczos"


class Extras(BaseModel):
    """The body of extra-single-image. Fields that do more than enlarge are refused."""

    image: str
    resize_mode: int = Field(0, ge=0, le=1)
    upscaling_resize: float = Field(2.0, ge=1, le=MAX_SCALE, allow_inf_nan=False)
    upscaler_1: str | None = Field("None", max_length=100)
    upscaler_2: str | None = Field("None", max_length=100)
    extras_upscaler_2_visibility: float = Field(0, ge=0, le=1)
    gfpgan_visibility: float = Field(0, ge=0, le=1)
    codeformer_visibility: float = Field(0, ge=0, le=1)


class Enlarged(BaseModel):
    """The answer of extra-single-image."""

    html_info: str = ""
    image: str = Field(description="A PNG in base64.")


def enlarge_images(routes: APIRouter, service: Service) -> None:
    """The endpoint."""

    @routes.post("/extra-single-image")
    async def extra_single_image(http: Request, body: Extras) -> Enlarged:
        upscaler_name = method(service, body)
        data = uploads.from_base64("image", body.image)
        image = await run_in_threadpool(lambda: np.array(uploads.open_upload("image", data, service.pixels)))
        flags = plain_flags((await run_in_threadpool(uploads.infotext, data))[1])
        if upscaler_name == "none":
            enlarged = image
        elif upscaler_name == LANCZOS:
            enlarged = await run_in_threadpool(resample, service, image, body.upscaling_resize)
        else:
            job = await run_in_threadpool(service.enlarge, owner(http), image, body.upscaling_resize)
            (enlarged,) = await service.wait_for_images(http, job)
            flags |= {"upscale": body.upscaling_resize, "upscaler": service.upscaler}
        text = await run_in_threadpool(lambda: base64.b64encode(uploads.encode_image(enlarged, flags)).decode())
        return Enlarged(image=text)


def method(service: Service, body: Extras) -> str:
    """The upscaler: "none", "lanczos" or the network's name, in lower case. Raises ArgumentError."""
    if body.resize_mode:
        raise ArgumentError("resize_mode", "1 is not supported: give 0, and the factor as upscaling_resize.")
    second = (body.upscaler_2 or "None").lower() != "none" and body.extras_upscaler_2_visibility > 0
    for name, in_use in (("upscaler_2", second), ("gfpgan_visibility", body.gfpgan_visibility),
                        ("codeformer_visibility", body.codeformer_visibility)):  # fmt: skip
        if in_use:
            raise ArgumentError(name, "is not supported: leave it out.")
    known = ["None", "Lanczos", *([] if service.upscaler is None else [service.upscaler])]
    upscaler_name = (body.upscaler_1 or "None").lower()
    if upscaler_name not in (name.lower() for name in known):
        raise ArgumentError("upscaler_1", f"{body.upscaler_1!r} is not available; known are {', '.join(known)}.")
    return upscaler_name


def plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Those of an upload's flags that are strings or numbers; none if its prompt is not a string."""
    scalars = {name: value for name, value in flags.items() if isinstance(value, str | int | float)}
    return scalars if isinstance(scalars.get("prompt", ""), str) else {}


def resample(service: Service, image: np.ndarray, scale: float) -> np.ndarray:
    """An image enlarged by the factor `scale` with a Lanczos filter. Raises ArgumentError."""
    height, width = (round(scale * side) for side in image.shape[:2])
    if height * width > service.pixels:
        raise ArgumentError("upscaling_resize", f"makes {width}x{height} pixels, more than {service.pixels}.")
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
