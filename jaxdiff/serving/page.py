"""The web page: a few files that call the server's own APIs, and the description of the model that they read."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from jaxdiff.diffusion.schedulers import SCHEDULERS
from jaxdiff.serving.service import Service
from jaxdiff.text.styles import read_styles

FOLDER = Path(__file__).parent / "page"
FILES = {"page.css": "text/css"} | dict.fromkeys(
    ("page.js", "common.js", "docs.js", "gallery.js", "images.js"), "text/javascript"
)
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def router(service: Service) -> APIRouter:
    """The page at /, and its files."""
    routes = APIRouter(include_in_schema=False)

    def add(path: str, name: str, kind: str) -> None:
        @routes.get(path)
        def file() -> Response:
            return Response((FOLDER / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    add("/", "index.html", "text/html")
    add("/docs", "docs.html", "text/html")
    for name, kind in FILES.items():
        add(f"/page/{name}", name, kind)

    @routes.get("/page/page.json")
    def page_data() -> dict[str, Any]:
        return capabilities(service)

    return routes


def capabilities(service: Service) -> dict[str, Any]:
    """What the model and the server support, so that the page offers only that."""
    engine = service.engine
    model = engine.model
    return {
        "model": service.name,
        "sizes": [f"{width}x{height}" for width, height in engine.limits.sizes],
        "schedulers": list(SCHEDULERS),
        "scheduler": engine.resolver.scheduler,
        "styles": sorted(read_styles()),
        "loras": list(engine.loras.files),
        "steps": service.steps,
        "max_steps": engine.limits.steps,
        "max_images": engine.limits.images,
        "guidance_scale": model.options.guidance_scale,
        "guidance": model.takes_guidance,
        "pag_scale": None if model.unet is None or model.is_gan else model.options.pag_scale,
        "negative_prompt": not model.one_pass,
        "needs_mask": model.inpaints,
        "controlnets": len(model.controlnets),
        "upscaler": service.upscaler,
        "upscaler_scale": 0 if model.upscaler is None else model.upscaler.config.scale,
    }
