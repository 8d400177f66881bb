"""Servers on real sockets, in a thread of their own, with a tiny random model."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from stretto.models.load import Model, load_model
from stretto.serve.backend import Backend, Pass, PassResult
from stretto.serve.http.run import Server, bind
from stretto.serve.http.service import Service
from stretto.serve.http.settings import ServerSettings
from stretto.serve.predict import PassCosts
from stretto.serve.settings import EngineSettings

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"


class Slow:
    """A backend whose every pass takes a while longer, or stands still, or breaks."""

    def __init__(self, inner: Backend) -> None:
        self.steps_at_once = inner.steps_at_once
        self.seconds = 0.0
        self.stalled = False
        self.failures = 0
        self._inner = inner

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        while self.stalled:
            await asyncio.sleep(0.005)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("this pass is broken")
        return await self._inner.run(work, steps, news)

    def wipe(self) -> None:
        self._inner.wipe()

    def forget(self, ids: Iterable[int]) -> None:
        self._inner.forget(ids)


class Running:
    """A server that listens, seen from a test.

    Attributes:
        url: where.
        backend: to slow it down.
    """

    def __init__(self, model: Model, settings: ServerSettings, costs: PassCosts | None) -> None:
        self.settings = settings
        self.service = Service(model, settings, costs=costs, wrap=self._slowly)
        self.server = Server(self.service)
        self._socket = bind(settings.host, settings.port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self._socket])))

    def _slowly(self, backend: Backend) -> Backend:
        self.backend = Slow(backend)
        return self.backend

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.server.started or not self._thread.is_alive())
        assert self.server.started

    def on_loop(self, call: Callable[[], Any]) -> None:
        self.server._loop.call_soon_threadsafe(call)

    def stop(self) -> None:
        self.backend.seconds, self.backend.stalled = 0.0, False
        if self._thread.is_alive():
            self.on_loop(self.service.engine.cancel_all)
            self.on_loop(self.server.leave)
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive()

    def idle(self) -> bool:
        return self.service.live == 0 and self.service.engine.scheduler.pool.held == 0

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, **options)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait for a condition, and say how long it took."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "it did not happen in time"
        time.sleep(0.002)
    return time.perf_counter() - start


@pytest.fixture(scope="session")
def chat_folder(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "chat"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def chat_model(chat_folder: Path) -> Model:
    return load_model(str(chat_folder), dtype="fp32", threads=1)


@contextmanager
def running(model: Model, *, costs: PassCosts | None = None, **options: Any) -> Iterator[Running]:
    engine = EngineSettings(model="tiny", dtype="fp32", threads=1, **options.pop("engine", {"slots": 4}))
    server = Running(model, ServerSettings(engine=engine, port=0, **options), costs)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    """One server for the tests of a file; it must be idle and healthy when they are done."""
    with running(chat_model) as found:
        yield found
        until(found.idle)
        found.service.engine.scheduler.pool.audit()
        assert found.service.problem() is None


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found
