"""An ASGI middleware that checks each request's key, origin and size."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdiff.serving.errors import HttpError, error_response

PUBLIC_PATHS = ("/healthz", "/readyz")
FILES = "/v1/images/files/"  # needs no key: the names are random


class Guard:
    """Refuses requests without the key, from other sites' pages, and with bodies that are too large or too slow.

    Args:
        app: the app to protect.
        api_key: sent as a bearer token, or as the password of any user; None: no key is needed.
        hosts: allowed names in the Host header, against DNS rebinding; None: any.
        body: maximum bytes of one body.
        bodies: maximum bytes of all bodies in progress.
        seconds: time limit for receiving a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        hosts: tuple[str, ...] | None = None,
        body: int = 32 << 20,
        bodies: int = 256 << 20,
        seconds: float = 60.0,
    ) -> None:
        self.app, self._hosts, self._body, self._bodies, self._seconds = app, hosts, body, bodies, seconds
        self._key = None if api_key is None else digest(api_key.encode())
        self._bytes_held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
        except HttpError as e:
            await error_response(scope["path"], e)(scope, receive, send)
            return
        received = 0
        deadline = time.monotonic() + self._seconds
        complete = False

        # FastAPI passes on only HTTPExceptions while it reads a body; `app` turns them into the API's form.
        async def limited_receive() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, f"The body did not come within {self._seconds:g} s.") from None
            size = len(message.get("body", b""))
            received += size
            self._bytes_held += size
            if received > self._body:
                raise HTTPException(413, self._too_large())
            if self._bytes_held > self._bodies:
                raise HTTPException(429, "Too many large requests at once: try again in a moment.")
            complete = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, limited_receive, send)
        finally:
            self._bytes_held -= received

    def _too_large(self) -> str:
        return f"The body is larger than {self._body} bytes: send a smaller image."

    def _check(self, path: str, headers: dict[str, str]) -> None:
        """Raise HttpError for what can be refused by the headers alone."""
        host = headers.get("host", "")
        if self._hosts is not None and hostname(host) not in self._hosts:
            raise HttpError(403, "This server is not known by that name: ask it as 127.0.0.1 or localhost.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise HttpError(403, "Pages of other sites may not ask this server.")
        if self._key is not None and path not in PUBLIC_PATHS and not path.startswith(FILES):
            key = digest(password(headers.get("authorization", "")))
            if not hmac.compare_digest(key, self._key):
                raise HttpError(401, "The API key is missing or wrong: send it as a bearer's token.")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._body:
            raise HttpError(413, self._too_large())


def digest(key: bytes) -> bytes:
    """A key as a digest, so that comparing keys does not reveal their length."""
    return hashlib.sha256(key).digest()


def password(authorization: str) -> bytes:
    """The key in an Authorization header: of a bearer, or the password of Basic, whatever the user's name."""
    kind, _, credentials = authorization.partition(" ")
    if kind.lower() == "bearer":
        return credentials.strip().encode("latin-1")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return b""


def hostname(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
