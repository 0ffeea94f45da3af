"""What every request passes first: the Host header, the key, the size of its body; and what every error becomes.

Knows HTTP and keys; knows nothing of the engine. An ASGI middleware, so that no route, not even one that does not
exist, answers anything before the key is known.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
import uuid
from collections.abc import Callable

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvi.serving.access import Access, is_loopback
from dvi.serving.connections import CROWDED
from dvi.serving.protocol import ApiError

OPEN_PATHS = {"/health"}  # for which nobody needs a key, and which are answered however many are connected
BODY_TIMEOUT_S = 30.0

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(?::[0-9]*)?", re.ASCII)

log = logging.getLogger(__name__)


class Middleware:
    """Lets a request in with scope["state"]["key"], its ApiKey, or answers it.

    on_rejected: told the code of every error answer, such as "unauthorised" or "too_large".
    """

    def __init__(
        self, app: ASGIApp, *, access: Access, max_body_bytes: int, on_rejected: Callable[[str], None]
    ) -> None:
        self._app, self._access, self._max_body_bytes, self._on_rejected = app, access, max_body_bytes, on_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return  # nothing else is served, and what is not answered is refused
        if scope["method"] == "HEAD":  # as GET: servers leave the body out
            scope = scope | {"method": "GET"}
        has_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        state = scope.setdefault("state", {})
        state |= {"on_rejected": self._on_rejected, "max_body_bytes": self._max_body_bytes}
        try:
            self._check(scope)
            await self._app(scope, receive, watched_send)
        except ApiError as error:
            await error_response(Request(scope), error)(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            number = uuid.uuid4().hex[:12]
            # Frames, not the error's words: those may quote what a client sent.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %s failed: %s\n%s", number, type(error).__name__, frames)
            log.debug("request %s", number, exc_info=error)
            if not has_begun:
                failure = ApiError(500, f"the server failed; its log has more under {number}", code="internal_error")
                await error_response(Request(scope), failure)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._access.is_open and not is_loopback(_host_name(headers.get("host", ""))):
            # A page elsewhere may have its name resolve to this machine, and then reads what this server answers.
            raise ApiError(403, "without API keys the Host must be a loopback name", code="wrong_host")
        if scope["path"] in OPEN_PATHS:
            return
        if scope["state"].get(CROWDED):
            raise ApiError(
                503, "the server has as many connections as it takes; try again later", code="too_many_connections",
                headers={"Retry-After": "1", "Connection": "close"},
            )  # fmt: skip
        key = self._access.identify(headers.get("authorization"))
        if key is None:
            # Only browsers ask for a dashboard, and they ask for a password only when told to.
            is_page = scope["path"].startswith("/dashboard")
            challenge = 'Basic realm="dvi"' if is_page else "Bearer"
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="unauthorised",
                headers={"WWW-Authenticate": challenge},
            )  # fmt: skip
        scope["state"]["key"] = key
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "Content-Length must be a number", code="invalid_request")
        if len(length) > 18 or int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)


async def read_body(request: Request) -> bytes:
    """The whole body, of application/json. Raises ApiError where it is of another type, too long or too slow.

    The type is insisted on: a page of another site can make a browser send any other without asking.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", code="invalid_request")
    limit, content = request.scope["state"]["max_body_bytes"], bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                content += piece
                if len(content) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise ApiError(408, f"the body must arrive within {BODY_TIMEOUT_S:.0f} s", code="slow_body") from None
    return bytes(content)


def error_response(request: Request, error: ApiError) -> JSONResponse:
    """OpenAI's error object; counted by its code."""
    request.scope["state"]["on_rejected"](error.code)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def routing_error(request: Request, error: HTTPException) -> JSONResponse:
    """What FastAPI itself refuses, as OpenAI's error object."""
    messages = {404: "there is nothing at this address", 405: "this address takes another method"}
    message = messages.get(error.status_code, "the request cannot be served")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    return error_response(request, ApiError(error.status_code, message, code=code, headers=headers))


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body must be at most {limit} bytes", code="too_large")


def _host_name(host: str) -> str:
    """The name or address of a Host header, without its port; empty, which is nobody's, where it is of no such form."""
    match = _HOST.fullmatch(host)
    return match[1] if match else ""
