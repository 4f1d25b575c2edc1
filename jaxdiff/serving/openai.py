"""OpenAI's images endpoints: /v1/images/generations, /v1/images/edits and /v1/models.

https://platform.openai.com/docs/api-reference/images. Fields of OpenAI's that this server cannot follow are refused by
name; a few of its own go beyond: negative_prompt, seed, steps, guidance_scale, scheduler and strength.
"""

import functools
import json
import math
import time
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from jaxdiff.errors import ArgumentError
from jaxdiff.serving import uploads
from jaxdiff.serving.errors import HttpError, http_error, openai_body
from jaxdiff.serving.requests import DrawRequest, Job
from jaxdiff.serving.service import Service
from jaxdiff.typing import SEEDS

OWNER = "jaxdiff"
STEPS = {"low": 0.5, "high": 2.0, "hd": 2.0}  # of the server's number, by quality
QUALITIES = {"standard": "medium", "auto": "medium", "hd": "high"}  # as answers call them
MAX_CHARACTERS = 32_000  # of a prompt that is read at all; the engine draws fewer


class Shared(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    model: str | None = Field(None, max_length=200)
    n: int = Field(1, ge=1, le=100)
    size: str = Field("auto", max_length=20, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    quality: Literal["auto", "low", "medium", "standard", "high", "hd"] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(95, ge=0, le=100)
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)
    # This server's own.
    negative_prompt: str | None = Field(None, max_length=MAX_CHARACTERS)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    steps: int | None = Field(None, ge=1, le=10_000)
    guidance_scale: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    scheduler: str | None = Field(None, max_length=40)


class Generation(Shared):
    """The body of /v1/images/generations."""

    style: str | None = Field(None, max_length=100, description="A preset of jaxdiff/text/styles.json.")
    moderation: Literal["auto", "low"] = "auto"  # nothing is moderated here


class Edit(Shared):
    """The form of /v1/images/edits, but for its files."""

    strength: float | None = Field(None, gt=0, le=1)


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    listed = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": OWNER}

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @routes.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        check_model(service, name)
        return listed

    @routes.post("/images/generations")
    async def generations(http: Request, body: Generation) -> Response:
        check_model(service, body.model)
        prompt, negative = service.styled(body.prompt, body.negative_prompt, body.style)
        width, height = size_of(service, body.size)
        asked = draw_request(service, body, prompt=prompt, negative_prompt=negative, width=width, height=height)
        return await answer(service, http, body, asked, "image_generation")

    @routes.post("/images/edits", openapi_extra={"requestBody": edit_schema()})
    async def edits(http: Request) -> Response:
        async with http.form(max_files=4, max_fields=40) as sent:
            files = [(name, file) for name, file in sent.multi_items() if isinstance(file, UploadFile)]
            try:
                form = Edit.model_validate({name: x for name, x in sent.items() if not isinstance(x, UploadFile)})
            except ValidationError as e:
                raise RequestValidationError([{**x, "loc": ("body", *x["loc"])} for x in e.errors()]) from None
            if unknown := {name for name, _ in files} - {"image", "image[]", "mask"}:
                raise ArgumentError(min(unknown)[:60], "is no file that an edit takes.")
            images = [await file.read() for name, file in files if name != "mask"]
            masks = [await file.read() for name, file in files if name == "mask"]
        check_model(service, form.model)
        if len(images) != 1:
            raise ArgumentError("image", f"must be one file, and {len(images)} came.")
        if len(masks) > 1:
            raise ArgumentError("mask", f"must be one file, and {len(masks)} came.")
        more = await run_in_threadpool(edited, service, form, images[0], masks[0] if masks else None)
        asked = draw_request(service, form, strength=form.strength, **more)
        return await answer(service, http, form, asked, "image_edit")

    @routes.get("/images/files/{name}")
    def file(name: str) -> Response:
        found = service.files.get(name)
        if found is None:
            raise HttpError(404, "There is no such image, or not any more.")
        return Response(found[1], media_type=uploads.MEDIA[found[0]], headers={"X-Content-Type-Options": "nosniff"})

    return routes


def edit_schema() -> dict[str, Any]:
    """The body of an edit as OpenAPI describes it."""
    schema = Edit.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"] |= {"image": file, "mask": file}
    schema["required"] = [*schema["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def check_model(service: Service, name: str | None) -> None:
    """Raise HttpError for a model that is not here."""
    if name is not None and name != service.name:
        message = f"The model {name!r} is not here: this server draws with {service.name!r}."
        raise HttpError(404, message, code="model_not_found", param="model")


def size_of(service: Service, size: str) -> tuple[int, int]:
    """Width and height of "512x512" or "auto". Raises ArgumentError."""
    given = (None, None) if size == "auto" else tuple(map(int, size.split("x")))
    return service.engine.size(*given)


def nearest_size(service: Service, width: int, height: int) -> tuple[int, int]:
    """The size of those drawn whose shape is most like an image's."""

    def unlike(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1] * height / width))

    return min(service.engine.limits.sizes, key=unlike)


def draw_request(service: Service, body: Shared, **more: Any) -> DrawRequest:
    """What the engine is asked for."""
    own = max(1, min(round(service.steps * STEPS.get(body.quality, 1.0)), service.engine.limits.steps))
    given: dict[str, Any] = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "n": body.n,
        "seed": body.seed,
        "steps": own if body.steps is None else body.steps,
        "guidance_scale": body.guidance_scale,
        "scheduler": body.scheduler,
    }
    return DrawRequest(**(given | more))


def edited(service: Service, form: Edit, image: bytes, mask: bytes | None) -> dict[str, Any]:
    """The images of an edit: transparent is redrawn, in the mask or, without one, in the image if it is anywhere."""
    source = uploads.opened("image", image, service.pixels)
    size = nearest_size(service, *source.size) if form.size == "auto" else size_of(service, form.size)
    found: dict[str, Any] = {"image": uploads.as_image(source, *size), "width": size[0], "height": size[1]}
    if mask is not None:
        opened = uploads.opened("mask", mask, service.pixels)
        if opened.size != source.size:
            shown = "{}x{} and {}x{}".format(*source.size, *opened.size)
            raise ArgumentError("mask", f"must be as large as the image; they are {shown}.")
        found["mask"] = uploads.transparency("mask", opened, *size)
    elif source.mode == "RGBA" and np.array(source.getchannel("A")).min() < 128:
        found["mask"] = uploads.transparency("image", source, *size)
    return found


async def answer(service: Service, http: Request, body: Shared, asked: DrawRequest, kind: str) -> Response:
    """The images at once, or a stream of events."""
    width, height = service.engine.size(asked.width, asked.height)
    described = {
        "background": "opaque",
        "output_format": body.output_format,
        "size": f"{width}x{height}",
        "quality": QUALITIES.get(body.quality, body.quality),
    }
    if body.stream:
        if body.response_format != "b64_json":
            raise ArgumentError("response_format", "of a stream is b64_json.")
        form = functools.partial(event, service, body, kind, described)
        parts = await service.events(http, asked, body.partial_images, form)
        return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    if body.partial_images:
        raise ArgumentError("partial_images", "are for streams: give stream as well.")
    job = await service.submit(http, asked)
    images = await service.finished(http, job)
    data = await run_in_threadpool(lambda: [entry(service, http, body, job, i, x) for i, x in enumerate(images)])
    content = {"created": int(time.time()), "data": data, **described, "usage": usage(job, len(data))}
    return Response(json.dumps(content), media_type="application/json")


def entry(service: Service, http: Request, body: Shared, job: Job, index: int, image: np.ndarray) -> dict[str, str]:
    """One image of an answer."""
    how = body.output_format, body.output_compression
    if body.response_format == "b64_json":
        return {"b64_json": service.base64(job, index, image, *how)}
    name = service.files.add(uploads.encoded(image, service.metadata(job, index), *how), body.output_format)
    return {"url": f"{str(http.base_url).rstrip('/')}/v1/images/files/{name}"}


def event(
    service: Service, body: Shared, kind: str, described: dict[str, str], job: Job | None = None, index: int = 0,
    image: np.ndarray | None = None, preview: int | None = None, error: BaseException | None = None,
) -> str:  # fmt: skip
    """One server-sent event: a partial image, a finished one, or an error."""
    if error is not None:
        return f"event: error\ndata: {json.dumps(openai_body(http_error(error)))}\n\n"
    assert job is not None
    assert image is not None
    name = f"{kind}.completed" if preview is None else f"{kind}.partial_image"
    data: dict[str, Any] = {
        "type": name,
        "b64_json": service.base64(job, index, image, body.output_format, body.output_compression),
        "created_at": int(time.time()),
        "image_index": index,  # this server's own, as it streams several images
        **described,
    }
    data |= {"usage": usage(job, 1)} if preview is None else {"partial_image_index": preview}
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def usage(job: Job, count: int) -> dict[str, Any]:
    """What OpenAI bills; here nothing is counted but images, so that clients that read it find numbers."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": count, "total_tokens": count}
