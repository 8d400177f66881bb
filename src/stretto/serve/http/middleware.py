"""Around every request: its id, its key, its line in the log, and a 500 without internals for our own mistakes."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stretto.core.clock import RealClock
from stretto.serve.handle import Handle
from stretto.serve.http.errors import ApiError, error_response
from stretto.serve.http.settings import ServerSettings

log = logging.getLogger("stretto.serve")

CLIENT_GONE = 499
"""What the log says of a request whose client went away before an answer (nginx's number; nobody receives it)."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GUARDED = ("/v1", "/tokenize", "/detokenize")
_POLLED = ("/", "/health", "/metrics", "/version", "/v1/stretto/live")
"""Paths that are asked again and again; their lines are for debugging only."""


@dataclass(eq=False)
class Note:
    """What the log will say of a request."""

    id: str
    status: int = CLIENT_GONE
    handles: list[Handle] = field(default_factory=list)


def note_of(scope: Scope) -> Note:
    """The note that goes with a request."""
    note: Note = scope["stretto.note"]
    return note


class Around:
    """The middleware; see the module."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, clock: RealClock) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        note = scope["stretto.note"] = Note(_request_id(headers.get(b"x-request-id")))
        began = self._clock.now
        sent = False

        async def noted(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = True
                note.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", note.id.encode())]
            await send(message)

        try:
            if not self._settings.may_be_called(headers.get(b"host", b"").decode("latin-1")):
                raise ApiError(403, "this server is not known by that name; see --allowed-host", code="unknown_host")
            if not self._may_enter(scope["path"], headers.get(b"authorization", b"")):
                raise ApiError(401, "send a valid API key: `Authorization: Bearer KEY`", code="invalid_api_key")
            await self._app(scope, receive, noted)
        except ClientDisconnect:
            pass
        except ApiError as error:
            await error_response(error)(scope, receive, noted)
        except Exception:
            log.exception("request %s has failed", note.id)
            if sent:
                raise
            problem = ApiError(500, f"this server made a mistake; its log knows more under {note.id}")
            await error_response(problem)(scope, receive, noted)
        finally:
            self._log(scope, note, self._clock.now - began)

    def _may_enter(self, path: str, authorization: bytes) -> bool:
        if not self._keys or not path.startswith(_GUARDED):
            return True
        scheme, _, given = authorization.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)

    def _log(self, scope: Scope, note: Note, seconds: float) -> None:
        path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        fields = {"id": note.id, "method": scope["method"], "path": path, "status": note.status}
        fields |= {**_figures(note.handles), "total_s": round(seconds, 4)}
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        level = logging.DEBUG if scope["path"] in _POLLED else logging.INFO
        log.log(level, "request %s", line, extra={"fields": fields})


def _request_id(given: bytes | None) -> str:
    text = (given or b"").decode("latin-1")
    return text if _SANE_ID.fullmatch(text) else secrets.token_hex(12)


def _figures(handles: Sequence[Handle]) -> dict[str, Any]:
    if not handles:
        return {}
    started = [handle.started_s - handle.arrived_s for handle in handles if handle.started_s is not None]
    first = [handle.times_s[0] - handle.arrived_s for handle in handles if handle.times_s]
    figures: dict[str, Any] = {
        "prompt_tokens": sum(len(handle.request.prompt) for handle in handles),
        "new_tokens": sum(len(handle.tokens) for handle in handles),
    }
    if started:
        figures["queue_s"] = round(max(started), 4)
    if first:
        figures["first_token_s"] = round(min(first), 4)
    reasons = {handle.reason or "cancelled" for handle in handles}
    return {**figures, "reason": ",".join(sorted(reasons))}
