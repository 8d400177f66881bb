"""A server and an `LLM` of two lanes: the same answers as of one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.errors import FieldError
from stretto.serve.http.settings import ServerSettings
from stretto.serve.sampling import Sampling
from stretto.serve.settings import EngineSettings, load

from .conftest import Running, until

PROMPTS = [
    "One, two, three,",
    "The river runs past house number 7. " * 16,
    "def add(a, b):",
    "Once upon a time",
    "Water",
]
LANES = {"path": "exact", "dtype": "fp32", "threads": 1, "slots": 3, "max_model_len": 1024, "prefill_tokens": 64}


@pytest.fixture(scope="module")
def one_lane(packaged: Path) -> stretto.LLM:
    return stretto.LLM(str(packaged), **LANES)


@pytest.fixture(scope="module")
def lanes(packaged: Path) -> Iterator[Running]:
    settings = EngineSettings(model=str(packaged), prefill="lanes", **LANES)
    running = Running(load(settings), ServerSettings(engine=settings, port=0), None)
    running.start()
    yield running
    running.stop()


def test_answers_are_those_of_one_lane(packaged: Path, one_lane: stretto.LLM) -> None:
    beside = stretto.LLM(str(packaged), prefill="lanes", **LANES)
    for sampling in (None, Sampling(temperature=1.5, seed=3)):
        wanted = one_lane.generate(PROMPTS, sampling, max_tokens=12, logprobs=1)
        found = beside.generate(PROMPTS, sampling, max_tokens=12, logprobs=1)
        assert [each.tokens for each in found] == [each.tokens for each in wanted]
        assert [each.logprobs for each in found] == [each.logprobs for each in wanted]
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted, found = (each.generate(PROMPTS, max_tokens=12, json_schema=schema) for each in (one_lane, beside))
    assert [each.text for each in found] == [each.text for each in wanted]


def test_a_server_of_two_lanes_answers_many_at_once(lanes: Running, one_lane: stretto.LLM) -> None:
    wanted = {prompt: one_lane.generate(prompt, max_tokens=10)[0].text for prompt in PROMPTS}
    with lanes.client() as client, ThreadPoolExecutor(8) as many:

        def ask(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": 10, "temperature": 0}
            text: str = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
            return text

        for prompt, text in zip(4 * PROMPTS, many.map(ask, 4 * PROMPTS), strict=True):
            assert text == wanted[prompt]
        assert client.get("/health").status_code == 200
        view = client.get("/v1/stretto/live").json()
    assert view["finished"] >= 20
    until(lanes.idle)


def test_a_request_that_is_left_gives_its_pages_back(lanes: Running) -> None:
    with lanes.client() as client:
        body = {"prompt": PROMPTS[1], "max_tokens": 500, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    until(lanes.idle)


def test_a_model_that_does_not_run_fused_is_refused(chat_folder: Path) -> None:
    with pytest.raises(FieldError, match="prefill is 'lanes'; it must be mixed, for a model whose weights"):
        stretto.LLM(str(chat_folder), dtype="fp32", threads=1, prefill="lanes")
