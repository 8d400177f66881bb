"""Reading a request's body within bounds of bytes, seconds and depth; whatever is wrong with it is a 400 or a 413."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from stretto.serve.http.errors import ApiError
from stretto.serve.http.settings import ServerSettings


class BoundedRequest(Request):
    """A request whose body is JSON and is read only as far as the settings of its server allow."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            settings: ServerSettings = self.app.state.service.settings
            if self.method == "POST":
                self._check_type()
            self._check_length(int_of(self.headers.get("content-length")), settings)
            try:
                async with asyncio.timeout(settings.body_seconds):
                    self._body = await self._read(settings)
            except TimeoutError:
                raise ApiError(400, f"the body did not arrive within {settings.body_seconds:g} s") from None
        return self._body

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as problem:
            raise ApiError(400, f"the body is not valid JSON: {problem}", code="invalid_json") from None

    async def _read(self, settings: ServerSettings) -> bytes:
        pieces, size = [], 0
        async for piece in self.stream():
            size += len(piece)
            self._check_length(size, settings)
            pieces.append(piece)
        return b"".join(pieces)

    def _check_type(self) -> None:
        """Refuse what a foreign web page could send unasked: browsers let it post anything but JSON."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(400, f"the body is of type {kind or 'none'!r}; it must be application/json")

    @staticmethod
    def _check_length(size: int, settings: ServerSettings) -> None:
        if size > settings.max_body_bytes:
            raise ApiError(413, f"the body is longer than {settings.max_body_bytes} bytes", code="body_too_large")


def int_of(header: str | None) -> int:
    """The number in a header; 0 where there is none."""
    return int(header) if header is not None and header.isdecimal() and len(header) < 19 else 0


class BoundedRoute(APIRoute):
    """A route that reads its bodies through `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await inner(BoundedRequest(request.scope, request.receive))

        return bounded
