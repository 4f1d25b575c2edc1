"""AUTOMATIC1111's API, which many programs speak: /sdapi/v1/txt2img, img2img, progress, interrupt, options, …

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. Fields without effect here are refused, or named in
the warnings of an answer's info.
"""

import datetime
import json
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from jaxdiff.io.images import describe
from jaxdiff.serving import uploads
from jaxdiff.serving.automatic_extras import enlarge_images
from jaxdiff.serving.automatic_fields import (
    ImageToImage,
    TextToImage,
    check_options,
    draw_request,
)
from jaxdiff.serving.requests import Cancelled, Job
from jaxdiff.serving.service import Service, owner
from jaxdiff.text.infotext import SAMPLERS, SCHEDULERS, read_infotext
from jaxdiff.text.styles import read_styles

PREVIEW = 2.0  # seconds that a request for progress waits for its preview


class PngInfo(BaseModel):
    """The body of png-info."""

    image: str


class Drawn(BaseModel):
    """The answer of txt2img and img2img."""

    images: list[str] = Field(description="PNGs in base64.")
    parameters: dict[str, Any]
    info: str = Field(description="JSON.")


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

    async def draw_images(http: Request, body: TextToImage) -> Drawn:
        start_time = time.time()
        request, warnings = await run_in_threadpool(draw_request, service, body)
        job = await service.submit(http, request)
        try:
            images: list[np.ndarray | None] = list(await service.wait_for_images(http, job))
        except Cancelled:  # by /interrupt: return the finished images
            images = job.images
        finished = {i: image for i, image in enumerate(images) if image is not None}
        texts = await run_in_threadpool(lambda: [service.base64(job, i, image) for i, image in finished.items()])
        parameters = body.model_dump(exclude={"init_images", "mask"})
        info = generation_info(service, job, list(finished), warnings, start_time)
        return Drawn(images=texts if body.send_images else [], parameters=parameters, info=json.dumps(info))

    @routes.post("/txt2img")
    async def txt2img(http: Request, body: TextToImage) -> Drawn:
        return await draw_images(http, body)

    @routes.post("/img2img")
    async def img2img(http: Request, body: ImageToImage) -> Drawn:
        return await draw_images(http, body)

    @routes.get("/progress")
    async def progress(http: Request, skip_current_image: bool = False) -> dict[str, Any]:
        jobs = [job for job in service.engine.jobs(owner(http)) if job.started]
        job = jobs[0] if jobs else None
        preview = None
        if job is not None and not skip_current_image:
            image = await run_in_threadpool(next_preview, job)
            preview = None if image is None else await run_in_threadpool(service.base64, job, 0, image)
        return progress_state(job, len(jobs), preview)

    @routes.post("/interrupt")
    @routes.post("/skip")
    def interrupt(http: Request) -> dict[str, Any]:
        for job in service.engine.jobs(owner(http)):
            job.cancel()
        return {}

    @routes.post("/png-info")
    def png_info(body: PngInfo) -> dict[str, Any]:
        text, flags = uploads.infotext(uploads.from_base64("image", body.image))
        return {
            "info": text,
            "items": {"parameters": text} if text else {},
            "parameters": flags or read_infotext(text)[0],
        }

    @routes.get("/options")
    def options() -> dict[str, Any]:
        return {"sd_model_checkpoint": service.name, "samples_format": "png", "CLIP_stop_at_last_layers": 1}

    @routes.post("/options")
    def set_options(body: dict[str, Any]) -> None:
        fixed = options()
        check_options(service, {name: value for name, value in body.items() if fixed.get(name) != value})

    list_names(routes, service)
    enlarge_images(routes, service)
    return routes


def list_names(routes: APIRouter, service: Service) -> None:
    """The endpoints that only list names."""

    @routes.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [{"name": name, "aliases": [scheduler], "options": {}} for name, scheduler in SAMPLERS.items()]

    @routes.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        defaults: dict[str, Any] = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{"name": name, "label": label, **defaults} for name, (label, _) in SCHEDULERS.items()]

    @routes.get("/sd-models")
    def sd_models() -> list[dict[str, Any]]:
        name = service.name
        return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]

    @routes.get("/upscalers")
    def upscalers() -> list[dict[str, Any]]:
        details = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        names = ["None", "Lanczos", *([] if service.upscaler is None else [service.upscaler])]
        return [{"name": name, **details} for name in names]

    @routes.get("/latent-upscale-modes")
    def latent_upscale_modes() -> list[dict[str, str]]:
        return [{"name": "Latent"}]

    @routes.get("/loras")
    def loras() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.engine.loras.files]

    @routes.get("/prompt-styles")
    def prompt_styles() -> list[dict[str, str]]:
        return [{"name": name, **style._asdict()} for name, style in read_styles().items()]


def next_preview(job: Job) -> np.ndarray | None:
    """A preview of an image in progress after its next steps; the latest one if they take longer than PREVIEW."""
    job.watched = True
    end = time.monotonic() + PREVIEW
    while job.watched and time.monotonic() < end and not job.future.done():
        time.sleep(0.02)
    return job.preview


def progress_state(job: Job | None, count: int, preview: str | None) -> dict[str, Any]:
    """The answer of progress."""
    fraction = 0.0 if job is None else job.fraction
    steps = 0 if job is None else job.request.steps
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "" if job is None else "scripts_txt2img",
        "job_count": count,
        "job_timestamp": datetime.datetime.now().strftime("%Y%m%d%H%M%S"),
        "job_no": 0,
        "sampling_step": round(fraction * steps),
        "sampling_steps": steps,
    }
    remaining = 0.0
    if job is not None and fraction:
        remaining = (time.monotonic() - job.since) * (1 - fraction) / fraction
    return {"progress": fraction, "eta_relative": remaining, "state": state, "current_image": preview, "textinfo": None}


def generation_info(
    service: Service, job: Job, finished: list[int], warnings: list[str], start_time: float
) -> dict[str, Any]:
    """The info of an answer; `finished` holds the indices of the finished images."""
    flag_sets = [service.metadata(job, i) for i in finished]
    request = job.request
    return {
        "prompt": request.prompt,
        "all_prompts": [job.prompts[i] for i in finished],
        "negative_prompt": request.negative_prompt or "",
        "all_negative_prompts": [request.negative_prompt or ""] * len(finished),
        "seed": job.seeds[0],
        "all_seeds": [job.seeds[i] for i in finished],
        "subseed": request.variation_seed if request.variation_seed is not None else -1,
        "subseed_strength": request.variation_strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": next(
            (n for n, s in SAMPLERS.items() if s == (request.scheduler or service.engine.resolver.scheduler)), ""
        ),
        "cfg_scale": flag_sets[0]["guidance_scale"] if flag_sets else request.guidance_scale,
        "steps": request.steps,
        "batch_size": len(job.seeds),
        "sd_model_name": service.name,
        "denoising_strength": request.strength,
        "clip_skip": request.clip_skip + 1,
        "infotexts": [describe(flags) for flags in flag_sets],
        "job_timestamp": datetime.datetime.fromtimestamp(start_time).strftime("%Y%m%d%H%M%S"),
        "warnings": warnings,
    }
