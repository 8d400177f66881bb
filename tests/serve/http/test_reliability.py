"""What a server owes beyond right answers: it notices who left, refuses what it cannot hold, tells its health, drains,
and after a storm of clients nothing is lost, doubled or left behind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from stretto.models.load import Model

from .conftest import Running, running, until

TEXT = "/v1/completions"


def body(most: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "abcd", "max_tokens": most, "ignore_eos": True, **more}


@pytest.fixture
def slow(chat_model: Model) -> Iterator[Running]:
    """A server of two slots and a queue of two, whose steps take 20 ms."""
    with running(chat_model, engine={"slots": 2}, max_queue=2, stall_seconds=0.3, drain_seconds=5) as server:
        server.backend.seconds = 0.02
        yield server


class Background:
    """Requests that run while the test looks on."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.replies: list[httpx.Response] = []
        self._threads: list[threading.Thread] = []

    def post(self, most: int, **more: Any) -> None:
        def ask() -> None:
            with self.server.client() as client:
                self.replies.append(client.post(TEXT, json=body(most, **more)))

        live = self.server.service.live
        thread = threading.Thread(target=ask)
        self._threads.append(thread)
        thread.start()
        until(lambda: self.server.service.live > live)

    def wait(self) -> list[int]:
        for thread in self._threads:
            thread.join(20)
        return [reply.status_code for reply in self.replies]


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_is_cancelled_within_a_step(slow: Running, streamed: bool) -> None:
    slow.backend.seconds = 0.1
    pool = slow.service.engine.scheduler.pool

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow.url, trust_env=False) as client:
            asking = asyncio.create_task(client.post(TEXT, json=body(200, stream=streamed)))
            while not pool.held:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    steps = slow.service.engine.steps
    until(slow.idle, 2)
    assert slow.service.engine.steps - steps <= 2
    with slow.client() as client:
        assert 'finished_reason="abort",model_name="tiny"} 1.0' in client.get("/metrics").text


def test_who_leaves_the_queue_never_runs(slow: Running) -> None:
    others = Background(slow)
    others.post(20)
    others.post(20)
    with pytest.raises(httpx.ReadTimeout), slow.client() as client:
        client.post(TEXT, json=body(200), timeout=0.1)
    assert others.wait() == [200, 200]
    until(slow.idle, 2)
    assert slow.service.engine.steps < 50


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_ends_at_its_deadline(slow: Running, streamed: bool) -> None:
    with slow.client() as client:
        start = time.perf_counter()
        reply = client.post(TEXT, json=body(200, timeout=0.3, stream=streamed))
        assert 0.3 <= time.perf_counter() - start < 2.0
        assert reply.status_code == (200 if streamed else 504)
        last = reply.text.strip().splitlines()[-3].removeprefix("data: ") if streamed else reply.text
        assert json.loads(last)["error"]["code"] == "deadline_exceeded"
        until(slow.idle, 2)
        assert 'finished_reason="deadline",model_name="tiny"} 1.0' in client.get("/metrics").text
        assert client.post(TEXT, json=body(3, timeout=5)).status_code == 200


def test_who_waits_beyond_its_deadline_never_runs_and_the_urgent_go_first(slow: Running) -> None:
    others = Background(slow)
    for _ in range(2):
        others.post(60)
    started: list[str] = []

    def ask(name: str, **more: Any) -> None:
        with slow.client() as client:
            reply = client.post(TEXT, json=body(1, **more))
            started.append(f"{name} {reply.status_code}")

    threads = []
    for name, more in (("late", {"timeout": 0.3}), ("patient", {"priority": 3})):
        live = slow.service.live
        threads.append(threading.Thread(target=ask, args=(name,), kwargs=more))
        threads[-1].start()
        until(lambda live=live: slow.service.live > live)  # type: ignore[misc]
    until(lambda: started == ["late 504"], 2)
    threads.append(threading.Thread(target=ask, args=("urgent",), kwargs={"priority": -3}))
    threads[-1].start()
    until(lambda: len(slow.service.engine.scheduler.waiting) == 2, 2)
    assert [request.priority for request in slow.service.engine.scheduler.waiting] == [-3, 3]
    assert others.wait() == [200, 200]
    for thread in threads:
        thread.join(20)
    assert sorted(started) == ["late 504", "patient 200", "urgent 200"]


def test_a_full_queue_says_when_to_come_back(slow: Running) -> None:
    others = Background(slow)
    for _ in range(4):
        others.post(30)
    with slow.client() as client:
        refused = client.post(TEXT, json=body(3))
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "2 wait" in refused.json()["error"]["message"]
        assert client.post(TEXT, json=body(3, n=5)).status_code == 400
        assert others.wait() == [200] * 4
        assert client.post(TEXT, json=body(3)).status_code == 200
        assert client.post(TEXT, json=body(3, n=4)).status_code == 200


def test_retry_after_follows_the_pace(slow: Running) -> None:
    service = slow.service
    assert service._retry_after_s(3) == 1
    service._finishes_s.extend(service.clock.now - 10 + i for i in range(10))
    assert service._retry_after_s(20) in (20, 21)
    assert service._retry_after_s(1000) == 60


def test_health_is_progress(slow: Running) -> None:
    with slow.client() as client:
        time.sleep(0.4)
        assert client.get("/health").status_code == 200
        slow.backend.stalled = True
        others = Background(slow)
        others.post(40)
        assert client.get("/health").status_code == 200
        assert until(lambda: client.get("/health").status_code == 503, 2) < 1.0
        assert "no step has finished" in client.get("/health").json()["error"]["message"]
        assert not client.get("/v1/stretto/live").json()["healthy"]
        slow.backend.stalled = False
        until(lambda: client.get("/health").status_code == 200, 2)
        assert others.wait() == [200]
        time.sleep(0.4)
        assert client.get("/health").status_code == 200


def test_a_broken_pass_is_made_up_for(slow: Running) -> None:
    slow.backend.seconds = 0.0
    with slow.client() as client:
        expected = client.post(TEXT, json=body(20, seed=3)).json()["choices"]
        slow.backend.seconds = 0.01
        others = Background(slow)
        others.post(20, seed=3)
        slow.backend.failures = 2
        assert others.wait() == [200]
        assert others.replies[0].json()["choices"] == expected
        assert slow.backend.failures == 0


@pytest.mark.parametrize("streamed", [True, False])
def test_passes_that_never_work_end_as_an_error(slow: Running, streamed: bool) -> None:
    slow.backend.seconds, slow.backend.failures = 0.0, 5
    with slow.client() as client:
        reply = client.post(TEXT, json=body(20, stream=streamed))
        if streamed:
            last = reply.text.strip().splitlines()
            assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == "engine_failed"
            assert last[-1] == "data: [DONE]"
        else:
            assert reply.status_code == 500
            assert reply.json()["error"]["code"] == "engine_failed"
        assert client.post(TEXT, json=body(3)).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_dead_engine_is_told(slow: Running) -> None:
    others = Background(slow)
    others.post(50)
    slow.on_loop(lambda: setattr(slow.service.engine, "_take_inbox", None))
    assert others.wait() == [500]
    with slow.client() as client:
        assert client.get("/health").status_code == 503
        reply = client.post(TEXT, json=body(3))
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_failed")


def test_our_own_mistake_is_a_500_without_internals(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ask: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(slow.service, "submit", broken)
    with slow.client() as client:
        reply = client.post(TEXT, json=body(3), headers={"X-Request-Id": "find-me"})
        assert reply.status_code == 500
        assert "secret" not in reply.text
        assert "find-me" in reply.json()["error"]["message"]
        assert reply.headers["x-request-id"] == "find-me"


def test_a_drain_lets_live_requests_finish_and_takes_no_more(slow: Running) -> None:
    others = Background(slow)
    for _ in range(3):
        others.post(20)
    with slow.client() as client:
        assert client.get("/health").status_code == 200
        slow.on_loop(slow.server.leave)
        until(lambda: slow.service.draining)
        reply = client.post(TEXT, json=body(3))
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in reply.headers
        assert client.get("/health").status_code == 503
    assert others.wait() == [200] * 3
    assert all(len(reply.json()["choices"][0]["text"]) > 0 for reply in others.replies)
    slow._thread.join(10)
    assert not slow._thread.is_alive()


def test_a_drain_ends(chat_model: Model) -> None:
    with running(chat_model, drain_seconds=0.2) as server:
        server.backend.seconds = 0.05
        others = Background(server)
        others.post(200)
        others.post(200, stream=True)
        server.on_loop(server.server.leave)
        server._thread.join(10)
        assert not server._thread.is_alive()
        assert sorted(others.wait()) == [200, 503]
        assert any("shut down" in reply.text for reply in others.replies if reply.status_code == 200)


def test_keys(chat_model: Model) -> None:
    with running(chat_model, api_keys=("first", "second")) as server, server.client() as client:
        for path in ("/health", "/metrics", "/version", "/"):
            assert client.get(path).status_code == 200
        for header in (None, "first", "Bearer", "Bearer wrong", "Basic first", "Bearer first second"):
            headers = {} if header is None else {"Authorization": header}
            for path in ("/v1/models", "/v1/stretto/live"):
                reply = client.get(path, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key"
            assert client.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 401
        for key in ("first", "second"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_each_request_has_one_line(slow: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stretto.serve")
    with slow.client() as client:
        client.post(TEXT, json=body(3), headers={"X-Request-Id": "mine"})
        client.post(TEXT, json={"prompt": 5})
        client.get("/health")
        with pytest.raises(httpx.ReadTimeout):
            client.post(TEXT, json=body(200), timeout=0.2)
    until(slow.idle, 2)
    until(lambda: len([r for r in caplog.records if hasattr(r, "fields")]) == 3)
    good, bad, gone = [r.fields for r in caplog.records if hasattr(r, "fields")]  # type: ignore[attr-defined]
    assert good["id"] == "mine"
    assert (good["status"], good["prompt_tokens"], good["new_tokens"], good["reason"]) == (200, 4, 3, "length")
    assert good["queue_s"] <= good["first_token_s"] <= good["total_s"]
    assert bad["status"] == 400
    assert (gone["status"], gone["reason"]) == (499, "cancelled")


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_storm_leaves_nothing_behind(chat_model: Model, seconds: float) -> None:
    """32 clients, random cancels and malformed bodies; each seeded request gives its one answer, once."""
    with running(chat_model, engine={"slots": 4}, max_queue=40) as server:
        with server.client() as client:
            asked = {seed: body(1 + seed % 40, seed=seed, temperature=2.0) for seed in range(24)}
            right = {seed: client.post(TEXT, json=one).json()["choices"][0] for seed, one in asked.items()}
        counts = asyncio.run(storm(server, asked, right, seconds))
        until(server.idle)
        server.service.engine.scheduler.pool.audit()
        assert server.service.engine._live == {}
        assert server.service._handles == {}
        assert server.service.engine.failures == 0
        assert min(counts[kind] for kind in ("whole", "stream", "left", "refused")) > 5, counts
        with server.client() as client:
            assert client.get("/health").status_code == 200
            metrics = client.get("/metrics").text
            ended = [line for line in metrics.splitlines() if line.startswith("stretto:request_success_total")]
            assert sum(float(line.split()[-1]) for line in ended) == server.service._next_number


async def storm(server: Running, asked: dict[int, Any], right: dict[int, Any], seconds: float) -> dict[str, int]:
    counts = dict.fromkeys(("whole", "stream", "left", "refused", "full"), 0)
    until_s = time.perf_counter() + seconds

    async def client_of(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as client:
            while time.perf_counter() < until_s:
                seed = draw.randrange(len(asked))
                match draw.choice(("whole", "stream", "left", "refused")):
                    case "whole":
                        reply = await client.post(TEXT, json=asked[seed])
                        counts["full" if reply.status_code == 429 else "whole"] += 1
                        assert reply.status_code == 429 or reply.json()["choices"][0] == right[seed]
                    case "stream":
                        reply = await client.post(TEXT, json={**asked[seed], "stream": True})
                        counts["full" if reply.status_code == 429 else "stream"] += 1
                        assert reply.status_code == 429 or streamed_text(reply.text) == right[seed]["text"]
                    case "left":
                        one = {**body(200, stream=draw.random() < 0.5)}
                        try:
                            await client.post(TEXT, json=one, timeout=draw.uniform(0.005, 0.2))
                        except httpx.TimeoutException:
                            counts["left"] += 1
                    case "refused":
                        bad = draw.choice((b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "n": -1}'))
                        reply = await client.post(TEXT, content=bad, headers={"Content-Type": "application/json"})
                        assert reply.status_code == 400
                        counts["refused"] += 1

    await asyncio.gather(*(client_of(number) for number in range(32)))
    return counts


def streamed_text(text: str) -> str:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)
