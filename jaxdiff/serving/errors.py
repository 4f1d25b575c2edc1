"""Errors in the form of each API, without internal details."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging
from fastapi.responses import JSONResponse

from jaxdiff.errors import ArgumentError, ImageError, JaxdiffError
from jaxdiff.serving.requests import Cancelled, QueueFull, Stopping, TooVaried
from jaxdiff.text.prompt_files import PromptError

AUTOMATIC = "/sdapi/"  # begins the paths of AUTOMATIC1111's API; all others have OpenAI's form


class HttpError(JaxdiffError):
    """A refused request: its status, the message, and the parameter at fault."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.wait = status, message, code, param, wait


class Kind(NamedTuple):
    """The type and code of an OpenAI error."""

    type: str
    code: str | None


KINDS = {
    401: Kind("authentication_error", "invalid_api_key"),
    403: Kind("permission_error", None),
    404: Kind("invalid_request_error", "not_found"),
    408: Kind("invalid_request_error", "request_timeout"),
    413: Kind("invalid_request_error", "request_too_large"),
    429: Kind("rate_limit_error", "queue_full"),
}


def http_error(error: BaseException) -> HttpError:
    """What a client is told of an error."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ArgumentError):
        return HttpError(400, str(error), code="invalid_value", param=error.argument)
    if isinstance(error, ImageError | PromptError):
        return HttpError(400, str(error), code="invalid_value")
    if isinstance(error, QueueFull):
        return HttpError(429, str(error), wait=error.seconds)
    if isinstance(error, TooVaried):
        return HttpError(429, str(error), code="too_varied", wait=error.seconds)
    if isinstance(error, Stopping):
        return HttpError(503, str(error), code="stopping", wait=30)
    if isinstance(error, Cancelled):
        return HttpError(409, str(error), code="cancelled")
    if isinstance(error, FloatingPointError):
        return HttpError(500, str(error), code="not_a_number")
    if "RESOURCE_EXHAUSTED" in str(error):
        return HttpError(503, "Memory is too small for this image: ask for a smaller one.", code="out_of_memory")
    logging.error("unexpected: %r", error, exc_info=error)
    return HttpError(500, "The images could not be drawn; the server's log says why.")


def openai_body(error: HttpError) -> dict[str, Any]:
    kind = KINDS.get(error.status, Kind("server_error" if error.status >= 500 else "invalid_request_error", None))
    code = error.code or kind.code
    return {"error": {"message": error.message, "type": kind.type, "param": error.param, "code": code}}


def automatic_body(error: HttpError) -> dict[str, Any]:
    names = {400: "InvalidArgument", 404: "NotFound", 422: "InvalidArgument", 429: "QueueFull"}
    return {"error": names.get(error.status, "Error"), "detail": error.message, "body": "", "errors": error.message}


def error_response(path: str, error: BaseException) -> JSONResponse:
    """An error in the form of the API that the path belongs to."""
    refusal = http_error(error)
    headers: Mapping[str, str] = {} if refusal.wait is None else {"Retry-After": str(refusal.wait)}
    if refusal.status in (408, 413):  # the rest of the body is not read
        headers = {"Connection": "close"}
    if refusal.status == 401:
        headers = {"WWW-Authenticate": 'Basic realm="jaxdiff", charset="UTF-8"'}
    body = automatic_body(refusal) if path.startswith(AUTOMATIC) else openai_body(refusal)
    return JSONResponse(body, refusal.status, headers)
