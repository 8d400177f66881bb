"""The official client, unchanged, against the packaged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from stretto.models.load import load_model

from .conftest import Running, running, until

openai = pytest.importorskip("openai")

MODEL = "tiny"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    model = load_model(str(request.getfixturevalue("packaged")), dtype="fp32", threads=1)
    with running(model, engine={"slots": 4, "max_model_len": 512}, api_keys=("sk-test",), max_queue=1) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0, timeout=60) as found:
        yield found


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=12)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_completions(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=6)
    assert "Paris" in answer.choices[0].text
    several = client.completions.create(model=MODEL, prompt=["One, two,", "A, b,"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_responses(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 12}
    answer = client.responses.create(**asked, instructions="You answer questions.")
    assert answer.status in ("completed", "incomplete")
    assert "Paris" in answer.output_text
    with client.responses.stream(**asked, instructions="You answer questions.") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == answer.output_text


def test_structured_outputs(client: Any) -> None:
    properties = {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_completion_tokens": 40}
    answer = client.chat.completions.create(**asked, response_format=form)
    assert set(json.loads(answer.choices[0].message.content)) == {"city", "large"}
    text = {"format": {"type": "json_schema", "name": "city", "schema": schema}}
    said = client.responses.create(model=MODEL, input="Name a city.", max_output_tokens=40, text=text)
    assert set(json.loads(said.output_text)) == {"city", "large"}


def test_logprobs(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 8}
    [choice] = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices
    assert "".join(item.token for item in choice.logprobs.content) == choice.message.content
    assert all(item.top_logprobs[0].token == item.token for item in choice.logprobs.content)
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, logprobs=2)
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.top_logprobs) <= 4


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_become_the_clients_own(client: Any, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="not supported yet"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, presence_penalty=0.5)


def test_who_closes_a_stream_frees_its_slot(client: Any, server: Running) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert until(server.idle, 5) < 3.0
