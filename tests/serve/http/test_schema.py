"""Schemathesis draws valid and invalid requests from /openapi.json: no 500, no answer it does not know of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from stretto.models.load import Model

from .conftest import Running, running, until

schemathesis = pytest.importorskip("schemathesis")

POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")
READ = ("/v1/models", "/v1/models/{name}", "/health", "/metrics", "/version", "/v1/stretto/live")
ORDINARY, THOROUGH = 25, 1000


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    with running(chat_model, engine={"slots": 8, "max_model_len": 48}) as found:
        yield found
        until(found.idle)
        found.service.engine.scheduler.pool.audit()
        assert found.service.problem() is None
        assert found.service.engine.failures == 0


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def attack(schema: Any, server: Running, path: str, method: str, mode: Any, examples: int) -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    operation = schema[path][method]
    seen: set[int] = set()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        reply = case.call(base_url=server.url, timeout=20)
        if reply.status_code == 504:
            assert reply.json()["error"]["code"] == "deadline_exceeded"
            assert case.body["timeout"] < 20
            return
        seen.add(reply.status_code)
        case.validate_response(reply, checks=checks)

    holds()
    allowed = {200, 400, 404, 405} if mode == schemathesis.GenerationMode.NEGATIVE else {200, 400, 404}
    assert seen <= allowed, seen
    if mode == schemathesis.GenerationMode.POSITIVE and "{" not in path:
        assert 200 in seen or path in POSTED


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", POSTED)
def test_posted(schema: Any, server: Running, path: str, mode: Any) -> None:
    attack(schema, server, path, "POST", mode, ORDINARY)


@pytest.mark.parametrize("path", READ)
def test_read(schema: Any, server: Running, path: str) -> None:
    attack(schema, server, path, "GET", schemathesis.GenerationMode.POSITIVE, 20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", POSTED)
def test_posted_thoroughly(schema: Any, server: Running, path: str, mode: Any) -> None:
    attack(schema, server, path, "POST", mode, THOROUGH)
