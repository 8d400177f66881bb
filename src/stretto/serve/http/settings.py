"""What can be set of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from stretto.core.errors import require
from stretto.serve.settings import EngineSettings


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a model is served.

    Attributes:
        engine: the model, and how it is run.
        host, port: where to listen; port 0 takes a free one.
        served_model_name: the name clients use; None takes the model's as it was given.
        api_keys: a request under /v1 must bear one of them; none: everybody may ask.
        allowed_hosts: names by which a server that listens on this machine alone may be asked, beside its own ones.
        max_queue: most requests that wait for a slot; the next one is answered 429.
        max_body_bytes: longest body of a request; a longer one is answered 413.
        body_seconds: longest time a client may take to send its body.
        stall_seconds: /health says 503 when requests are live and no step has finished for this long.
        drain_seconds: how long live requests may go on after SIGTERM.
        json_logs: log lines as JSON objects.
    """

    engine: EngineSettings = field(default_factory=EngineSettings)
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 2**20
    body_seconds: float = 30.0
    stall_seconds: float = 2.0
    drain_seconds: float = 30.0
    json_logs: bool = False

    def __post_init__(self) -> None:
        require(bool(self.host), "host", self.host, "a name or an address")
        require(0 <= self.port <= 65535, "port", self.port, "in 0 .. 65535")
        name = self.served_model_name
        require(name is None or bool(name.strip()), "served_model_name", name, "a name that is not empty")
        # The keys themselves stay out of the message.
        require(all(key.strip() and key.isascii() for key in self.api_keys), "api_key", "...", "ASCII, not empty")
        require(0 <= self.max_queue <= 1_000_000, "max_queue", self.max_queue, "in 0 .. 1000000")
        require(1024 <= self.max_body_bytes <= 2**30, "max_body_bytes", self.max_body_bytes, "in 1024 .. 2**30")
        for name in ("body_seconds", "stall_seconds"):
            require(0 < getattr(self, name) <= 3600, name, getattr(self, name), "in (0, 3600]")
        require(0 <= self.drain_seconds <= 86400, "drain_seconds", self.drain_seconds, "in 0 .. 86400")

    @property
    def model_name(self) -> str:
        """The name clients use."""
        return self.served_model_name or self.engine.model

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def may_be_called(self, host: str) -> bool:
        """Whether a request's Host header names this server. A page whose name was made to lead here does not: without
        a key, and only to this machine, it would be let in as one of this server's own pages.
        """
        name = host.strip().lower()
        name = name.partition("]")[0].lstrip("[") if name.startswith("[") else name.partition(":")[0]
        return not self.is_local or not name or is_loopback(name) or name in map(str.lower, self.allowed_hosts)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
