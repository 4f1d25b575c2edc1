"""The server as one ASGI app: both APIs, health, metrics and the description of it all."""

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from jaxdiff.errors import JaxdiffError
from jaxdiff.serving import automatic, openai, page
from jaxdiff.serving.errors import AUTOMATIC, HttpError, error_response
from jaxdiff.serving.guard import Guard
from jaxdiff.serving.metrics import Metrics
from jaxdiff.serving.service import Service
from jaxdiff.version import __version__

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A parameter is invalid.", 401: "The API key is missing or wrong.", 404: "Not found.",
        409: "Cancelled.", 413: "Too large.", 422: "A parameter is invalid.", 429: "Too many requests.",
        500: "The images could not be drawn.", 503: "The server is stopping.", 504: "Timed out.",
    }.items()
}  # fmt: skip


def create_app(service: Service, metrics: Metrics, **guard: Any) -> FastAPI:
    """The app of a service.

    Args:
        guard: arguments of `Guard`: the API key, and the bounds of bodies.
    """
    app = FastAPI(title="jaxdiff", version=__version__, responses=ERRORS, docs_url=None, redoc_url=None)
    app.include_router(openai.router(service))
    app.include_router(automatic.router(service))
    app.include_router(page.router(service))
    engine = service.engine

    @app.get("/healthz", tags=["server"])
    def healthz() -> PlainTextResponse:
        """Whether the process is alive."""
        return PlainTextResponse("ok")

    @app.get("/readyz", tags=["server"])
    def readyz() -> PlainTextResponse:
        """Whether images are drawn without waiting for the compiler."""
        ready = engine.ready.is_set() and not engine.stopping
        return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

    @app.get("/metrics", tags=["server"])
    def read_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"][1:]) or "body"
        status = 422 if http.url.path.startswith(AUTOMATIC) else 400
        message = f"{location}: {first['msg']}"[:500]
        return error_response(http.url.path, HttpError(status, message, code="invalid_value", param=location[:100]))

    @app.exception_handler(StarletteHTTPException)
    async def refused(http: Request, error: HTTPException) -> JSONResponse:
        code = "method_not_allowed" if error.status_code == 405 else None
        refusal = HttpError(
            error.status_code, str(error.detail), code=code, wait=5 if error.status_code == 429 else None
        )
        response = error_response(http.url.path, refusal)
        response.headers.update({k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"})
        return response

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> JSONResponse:
        return error_response(http.url.path, error)

    for kind in (JaxdiffError, FloatingPointError):
        app.exception_handler(kind)(failed)
    app.add_middleware(Guard, **guard)
    return app
