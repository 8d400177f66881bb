"""From settings to a server that listens, and from SIGTERM to an orderly end."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from stretto.core.errors import UserError
from stretto.serve.http.app import create_app
from stretto.serve.http.service import Service
from stretto.serve.http.settings import ServerSettings
from stretto.serve.predict import PassCosts
from stretto.serve.settings import load

log = logging.getLogger("stretto.serve")

_IDLE_CONNECTION_S = 30
_LAST_BYTES_S = 5
"""How long answers that are complete may take to reach their clients when the server ends."""


class Server(uvicorn.Server):
    """Uvicorn that drains before it closes its door: on the first signal new requests are answered 503 while live ones
    go on; a second signal cancels them.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_CONNECTION_S,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self.service = service
        self.signal: int | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, sig
        self._loop.call_soon_threadsafe(self.leave if first else self.service.engine.cancel_all)

    def leave(self) -> None:
        """Drain, then end; to be called on the server's event loop."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        await self.service.drain()
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which does not listen yet.

    Raises:
        UserError: if the address is taken or is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError) as problem:
        right = "choose another --port, or 0 for a free one" if port else "choose another --host"
        why = getattr(problem, "strerror", None) or problem
        raise UserError(f"cannot listen on {host}:{port}: {why}", right=right) from None
    return sock


def serve(settings: ServerSettings, *, costs: PassCosts | None = None) -> int | None:
    """Serve until a signal comes, and return its number.

    Raises:
        UserError: if the address or the model cannot be had.
    """
    log_to_stderr(as_json=settings.json_logs)
    with bind(settings.host, settings.port) as sock:
        host, port = sock.getsockname()[:2]
        if not settings.is_local and not settings.api_keys:
            log.warning("anyone who reaches %s may use this server: it has no --api-key", host)
        service = Service(load(settings.engine), settings, costs=costs)
        # What is loaded now stays: full collections, which large bodies set off, need not walk through it each time.
        gc.collect()
        gc.freeze()
        shown = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", settings.model_name, shown, port)
        server = Server(service)
        asyncio.run(server.serve([sock]))
    log.info("ended")
    return server.signal


def log_to_stderr(*, as_json: bool) -> None:
    """Send this package's log lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("stretto")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", None) or {"message": record.getMessage()}
        line = {"time": self.formatTime(record), "level": record.levelname, **fields}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
