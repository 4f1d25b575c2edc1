"""OpenAI's images endpoints: /v1/images/generations, /v1/images/edits and /v1/models.

https://platform.openai.com/docs/api-reference/images. OpenAI's fields that this server does not support are refused by
name; it has a few of its own, such as negative_prompt, seed and steps.
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
from jaxdiff.io.images import fit, fit_mask
from jaxdiff.serving import uploads
from jaxdiff.serving.errors import HttpError, http_error, openai_body
from jaxdiff.serving.requests import DrawRequest, Job
from jaxdiff.serving.service import Service
from jaxdiff.typing import SEEDS

OWNER = "jaxdiff"
STEPS = {"low": 0.5, "high": 2.0, "hd": 2.0}  # factor of the server's number of steps, by quality
QUALITIES = {"standard": "medium", "auto": "medium", "hd": "high"}  # as answers call them
CONTROL_IMAGES = "control_images"
MAX_CHARACTERS = 32_000  # of a prompt in a body; `Limits.prompt` is lower


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
    pag_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    scheduler: str | None = Field(None, max_length=40)
    style: str | None = Field(None, max_length=100, description="A preset of jaxdiff/text/styles.json.")
    matrix: bool = Field(False, description="{red|green} in the prompt draws each of them, n times.")
    control_edges: bool = Field(False, description="Find the edges of the control images first.")
    controlnet_scale: float = Field(1.0, ge=0, le=2)


class Generation(Shared):
    """The body of /v1/images/generations."""

    moderation: Literal["auto", "low"] = "auto"  # nothing is moderated here
    control_images: list[str] = Field([], max_length=8, description="In base64, one for each ControlNet.")


class Edit(Shared):
    """The form of /v1/images/edits, but for its files."""

    strength: float | None = Field(None, gt=0, le=1)
    outpaint: str | None = Field(None, max_length=40, description="Pixels added and drawn: left,top,right,bottom.")


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    model_info = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": OWNER}

    @routes.get("/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_info]}

    @routes.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        check_model(service, name)
        return model_info

    @routes.post("/images/generations")
    async def generations(http: Request, body: Generation) -> Response:
        check_model(service, body.model)
        prompt, negative = service.apply_style(body.prompt, body.negative_prompt, body.style)
        size = size_of(service, body.size)
        controls = await run_in_threadpool(
            lambda: control_inputs(
                service, body, [uploads.from_base64(CONTROL_IMAGES, x) for x in body.control_images], size
            )
        )
        arguments = {"prompt": prompt, "negative_prompt": negative, "width": size[0], "height": size[1], **controls}
        request = draw_request(service, body, **arguments)
        return await respond(service, http, body, request, "image_generation")

    @routes.post("/images/edits", openapi_extra={"requestBody": edit_schema()})
    async def edits(http: Request) -> Response:
        form, files = await read_form(http)
        check_model(service, form.model)
        for name, max_files in (("image", 1), ("mask", 1), ("control_image", 8)):
            if len(files[name]) > max_files or (name == "image" and not files[name]):
                raise ArgumentError(name, f"must be one file, and {len(files[name])} came.")
        prompt, negative = service.apply_style(form.prompt, form.negative_prompt, form.style)
        inputs = await run_in_threadpool(edit_inputs, service, form, files)
        request = draw_request(service, form, prompt=prompt, negative_prompt=negative, strength=form.strength, **inputs)
        return await respond(service, http, form, request, "image_edit")

    @routes.get("/images/files/{name}")
    def file(name: str) -> Response:
        stored = service.files.get(name)
        if stored is None:
            raise HttpError(404, "There is no such image, or not any more.")
        return Response(stored[1], media_type=uploads.MEDIA[stored[0]], headers={"X-Content-Type-Options": "nosniff"})

    return routes


async def read_form(http: Request) -> tuple[Edit, dict[str, list[bytes]]]:
    """The fields and the files of an edit. Raises RequestValidationError, ArgumentError."""
    names = {"image": "image", "image[]": "image", "mask": "mask", "control_image": "control_image"}
    files: dict[str, list[bytes]] = {name: [] for name in names.values()}
    async with http.form(max_files=12, max_fields=40) as fields:
        try:
            form = Edit.model_validate({name: x for name, x in fields.items() if not isinstance(x, UploadFile)})
        except ValidationError as e:
            raise RequestValidationError([{**x, "loc": ("body", *x["loc"])} for x in e.errors()]) from None
        uploaded = [(name, file) for name, file in fields.multi_items() if isinstance(file, UploadFile)]
        if unknown := {name for name, _ in uploaded} - names.keys():
            raise ArgumentError(min(unknown)[:60], "is not a file that an edit takes.")
        for name, file in uploaded:
            files[names[name]].append(await file.read())
    return form, files


def edit_schema() -> dict[str, Any]:
    """The body of an edit as OpenAPI describes it."""
    schema = Edit.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"] |= {"image": file, "mask": file, "control_image": file}
    schema["required"] = [*schema["required"], "image"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def check_model(service: Service, name: str | None) -> None:
    """Raise HttpError for a model other than the server's."""
    if name is not None and name != service.name:
        message = f"The model {name!r} is not available: this server draws with {service.name!r}."
        raise HttpError(404, message, code="model_not_found", param="model")


def size_of(service: Service, size: str) -> tuple[int, int]:
    """Width and height of "512x512" or "auto". Raises ArgumentError."""
    sides = (None, None) if size == "auto" else tuple(map(int, size.split("x")))
    return service.engine.resolver.size(*sides)


def nearest_size(service: Service, width: int, height: int) -> tuple[int, int]:
    """The allowed size whose aspect ratio is nearest to an image's."""

    def shape_difference(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1] * height / width))

    return min(service.engine.limits.sizes, key=shape_difference)


def draw_request(service: Service, body: Shared, **overrides: Any) -> DrawRequest:
    """The request to the engine."""
    default_steps = max(1, min(round(service.steps * STEPS.get(body.quality, 1.0)), service.engine.limits.steps))
    arguments: dict[str, Any] = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "n": body.n,
        "seed": body.seed,
        "steps": default_steps if body.steps is None else body.steps,
        "guidance_scale": body.guidance_scale,
        "pag_scale": body.pag_scale,
        "scheduler": body.scheduler,
        "matrix": body.matrix,
    }
    return DrawRequest(**(arguments | overrides))


def edit_inputs(service: Service, form: Edit, files: dict[str, list[bytes]]) -> dict[str, Any]:
    """The images of an edit. The transparent area of the mask, or without one of the image, is redrawn."""
    source = uploads.open_upload("image", files["image"][0], service.pixels)
    inputs: dict[str, Any]
    if form.outpaint is not None:
        if files["mask"]:
            raise ArgumentError("outpaint", "and mask both say what is drawn: give one of them.")
        canvas, margins = uploads.outpaint("outpaint", source, parse_margins(form.outpaint), service.pixels)
        size = edit_size(service, form, canvas.shape[1], canvas.shape[0])
        inputs = {"image": fit(canvas, *size[::-1]), "mask": fit_mask(margins, *size[::-1]) > 0}
    else:
        size = edit_size(service, form, *source.size)
        inputs = {"image": uploads.as_image(source, *size)}
    if files["mask"]:
        mask_image = uploads.open_upload("mask", files["mask"][0], service.pixels)
        if mask_image.size != source.size:
            sizes = "{}x{} and {}x{}".format(*source.size, *mask_image.size)
            raise ArgumentError("mask", f"must be as large as the image; they are {sizes}.")
        inputs["mask"] = uploads.transparency("mask", mask_image, *size)
    elif "mask" not in inputs and source.mode == "RGBA" and np.array(source.getchannel("A")).min() < 128:
        inputs["mask"] = uploads.transparency("image", source, *size)
    return {
        **inputs,
        "width": size[0],
        "height": size[1],
        **control_inputs(service, form, files["control_image"], size),
    }


def edit_size(service: Service, form: Edit, width: int, height: int) -> tuple[int, int]:
    """Width and height at which an image of this size is drawn."""
    return nearest_size(service, width, height) if form.size == "auto" else size_of(service, form.size)


def parse_margins(text: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of "64,0,64,0". Raises ArgumentError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) <= 5 for part in parts):
        raise ArgumentError("outpaint", "must be four numbers of pixels: left,top,right,bottom.")
    left, top, right, bottom = map(int, parts)
    return left, top, right, bottom


def control_inputs(service: Service, body: Shared, files: list[bytes], size: tuple[int, int]) -> dict[str, Any]:
    """The images that ControlNets follow, and their scale. Raises ArgumentError."""
    if not files:
        return {}
    images = [uploads.as_image(uploads.open_upload(CONTROL_IMAGES, file, service.pixels), *size) for file in files]
    images = [uploads.edges(CONTROL_IMAGES, image) for image in images] if body.control_edges else images
    return {"control_images": tuple(images), "controlnet_scale": body.controlnet_scale}


async def respond(service: Service, http: Request, body: Shared, request: DrawRequest, kind: str) -> Response:
    """The images at once, or a stream of events."""
    width, height = service.engine.resolver.size(request.width, request.height)
    common = {
        "background": "opaque",
        "output_format": body.output_format,
        "size": f"{width}x{height}",
        "quality": QUALITIES.get(body.quality, body.quality),
    }
    if body.stream:
        if body.response_format != "b64_json":
            raise ArgumentError("response_format", "of a stream is b64_json.")
        format_event = functools.partial(event, service, body, kind, common)
        events = await service.events(http, request, body.partial_images, format_event)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    if body.partial_images:
        raise ArgumentError("partial_images", "are for streams: give stream as well.")
    job = await service.submit(http, request)
    images = await service.wait_for_images(http, job)
    data = await run_in_threadpool(lambda: [image_entry(service, http, body, job, i, x) for i, x in enumerate(images)])
    content = {"created": int(time.time()), "data": data, **common, "usage": usage(job, len(data))}
    return Response(json.dumps(content), media_type="application/json")


def image_entry(
    service: Service, http: Request, body: Shared, job: Job, index: int, image: np.ndarray
) -> dict[str, str]:
    """One image of an answer."""
    encoding = body.output_format, body.output_compression
    if body.response_format == "b64_json":
        return {"b64_json": service.base64(job, index, image, *encoding), **revised_prompt(body, job, index)}
    name = service.files.add(uploads.encode_image(image, service.metadata(job, index), *encoding), body.output_format)
    return {"url": f"{str(http.base_url).rstrip('/')}/v1/images/files/{name}", **revised_prompt(body, job, index)}


def revised_prompt(body: Shared, job: Job, index: int) -> dict[str, str]:
    """The prompt of an image drawn with `matrix`."""
    return {"revised_prompt": job.prompts[index]} if body.matrix else {}


def event(
    service: Service, body: Shared, kind: str, common: dict[str, str], job: Job | None = None, index: int = 0,
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
        "image_index": index,  # not in OpenAI's API, which streams one image
        "seed": job.seeds[index],  # likewise
        **revised_prompt(body, job, index),
        **common,
    }
    data |= {"usage": usage(job, 1)} if preview is None else {"partial_image_index": preview}
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def usage(job: Job, count: int) -> dict[str, Any]:
    """The usage that OpenAI bills, for clients that read it; the only count here is that of images."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": count, "total_tokens": count}
