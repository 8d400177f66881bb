"""Logprobs over HTTP: whole and streamed alike, with the bytes of each token."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stretto
from stretto.core.errors import FieldError
from stretto.models.load import Model
from stretto.serve.handle import Handle
from stretto.serve.http.logprobs import Speller, entries_of
from stretto.serve.logprobs import Logprob
from stretto.serve.request import Answer, Request
from stretto.serve.text import AnswerText

from .test_api import CHAT, RESPONSES, TEXT, post, stream, user


def test_tokens_without_a_text_are_told_apart(chat_model: Model) -> None:
    assert chat_model.spec.vocab > chat_model.tokenizer.size == 96
    one = Logprob(token=97, logprob=-1.0, top=((98, -0.5), (97, -1.0)))
    assert Speller(chat_model.tokenizer).completion([(0, one)])["top_logprobs"] == [
        {"token_id:98": -0.5, "token_id:97": -1.0}
    ]


def text_of(items: list[Any]) -> str:
    return b"".join(bytes(item["bytes"]) for item in items).decode(errors="replace")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**40),
    n=st.integers(1, 2),
    top=st.integers(0, 20),
    stop=st.lists(st.text("abcdefgXYZ!#%", min_size=1, max_size=2), max_size=3),
)
def test_a_chat_answers_tokens_spell_its_text(
    client: httpx.Client, seed: int, n: int, top: int, stop: list[str]
) -> None:
    asked = {"messages": user("ab"), "seed": seed, "n": n, "stop": stop, "max_tokens": 25, "temperature": 1.5}
    asked |= {"logprobs": True, "top_logprobs": top}
    whole = post(client, CHAT, **asked)["choices"]
    streamed: dict[int, list[Any]] = {i: [] for i in range(n)}
    for chunk in stream(client, CHAT, **asked)[:-1]:
        [choice] = chunk["choices"]
        if choice["delta"].get("content"):
            streamed[choice["index"]] += choice["logprobs"]["content"]
    for choice in whole:
        items = choice["logprobs"]["content"]
        assert items == streamed[choice["index"]]
        text = choice["message"]["content"]
        assert text_of(items) == text if not stop else text_of(items).startswith(text)
        for item in items:
            assert len(item["top_logprobs"]) == top
            values = [one["logprob"] for one in item["top_logprobs"]]
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1 + 1e-9
            assert item["logprob"] <= (values or [0])[0] <= 0


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40), top=st.integers(0, 5))
def test_a_completions_tokens_lie_at_their_offsets(client: httpx.Client, seed: int, top: int) -> None:
    asked = {"prompt": "ab", "seed": seed, "max_tokens": 25, "temperature": 1.5, "logprobs": top}
    [choice] = post(client, TEXT, **asked)["choices"]
    found = choice["logprobs"]
    assert len({len(column) for column in found.values()}) == 1
    whole = True
    for token, value, others, offset in zip(*(found[name] for name in found), strict=True):
        if whole and not token.startswith(("bytes:", "token_id:", "<|")):
            assert choice["text"][offset:].startswith(token)
        if not token.startswith(("token_id:", "<|")):
            whole = not token.startswith("bytes:")
        assert top <= len(others) <= top + 1
        assert others[token] == value
    pieces = [chunk["choices"][0]["logprobs"] for chunk in stream(client, TEXT, **asked)[:-1]]
    assert {name: [x for piece in pieces for x in piece[name]] for name in found} == found


def test_greedy_tokens_are_the_likeliest(client: httpx.Client) -> None:
    asked = {"messages": user("ab"), "max_tokens": 12, "temperature": 0}
    body = post(client, CHAT, **asked, logprobs=True, top_logprobs=1)["choices"][0]
    assert body["message"] == post(client, CHAT, **asked)["choices"][0]["message"]
    assert all(item["top_logprobs"][0]["token"] == item["token"] for item in body["logprobs"]["content"])


def test_responses_carry_them_where_asked(client: httpx.Client) -> None:
    asked = {"input": "ab", "max_output_tokens": 12, "temperature": 0}
    assert post(client, RESPONSES, **asked)["output"][0]["content"][0]["logprobs"] == []
    asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = post(client, RESPONSES, **asked)["output"][0]["content"][0]
    assert text_of(part["logprobs"]) == part["text"]
    chunks = stream(client, RESPONSES, **asked)
    deltas = [item for c in chunks if c["type"] == "response.output_text.delta" for item in c["logprobs"]]
    assert deltas == part["logprobs"] == chunks[-1]["response"]["output"][0]["content"][0]["logprobs"]


def test_the_offline_class_tells_them_too(llm: stretto.LLM) -> None:
    [plain] = llm.generate("ab", max_tokens=9, ignore_eos=True)
    [answer] = llm.generate("ab", max_tokens=9, ignore_eos=True, logprobs=3)
    assert plain.logprobs is None
    assert answer.logprobs is not None
    assert tuple(one.token for one in answer.logprobs) == answer.tokens == plain.tokens
    assert all(one.top[0] == (one.token, one.logprob) and len(one.top) == 3 for one in answer.logprobs)
    with pytest.raises(FieldError, match="logprobs"):
        llm.chat([{"role": "user", "content": "ab"}], logprobs=21)


@pytest.fixture(scope="module")
def llm(chat_folder: object) -> stretto.LLM:
    return stretto.LLM(str(chat_folder), dtype="fp32", threads=1, slots=3)


def spoken(
    model: Model, tokens: list[int], stop: tuple[str, ...] = (), ends: frozenset[int] = frozenset()
) -> tuple[Answer, list[list[tuple[int, int]]]]:
    """The answer of these tokens, and the (offset, token)s that came with each piece of text."""
    request = Request(id=0, prompt=(1,), limit=len(tokens), stop=stop, stop_tokens=ends, logprobs=0)
    handle, pieces, given = Handle(request, 0.0, AnswerText(model.tokenizer, stop)), [], 0
    for token in tokens:
        if handle.take(token, 0.0, Logprob(token=token, logprob=-1.0)):
            break
        text = handle.stream.text
        pieces.append([(at, one.token) for at, one in handle.logprobs_between(given, len(text))])
        given = len(text)
    pieces.append([(at, one.token) for at, one in handle.logprobs_between(given, len(handle.stream.text))])
    return handle.result(), pieces


def test_parts_of_a_character_begin_where_it_does(real_model: Model) -> None:
    tokens = real_model.tokenizer.encode("a\U0001f9e9b", special=False)
    assert len(tokens) > 4
    answer, pieces = spoken(real_model, tokens)
    assert answer.offsets == (0, *(1,) * (len(tokens) - 2), 2)
    assert [token for piece in pieces for _, token in piece] == tokens
    spelt = [Speller(real_model.tokenizer).item(one) for _, one in entries_of(answer)]
    assert b"".join(bytes(one["bytes"]) for one in spelt).decode() == answer.text == "a\U0001f9e9b"
    assert spelt[1]["token"].startswith("bytes:\\xf0")


def test_the_token_that_ends_an_answer_inside_a_character_is_left_out(real_model: Model) -> None:
    tokens = real_model.tokenizer.encode("a\U0001f9e9", special=False)[:-1]
    end = min(real_model.tokenizer.eos_ids)
    answer, pieces = spoken(real_model, [*tokens, end], ends=frozenset({end}))
    assert answer.reason == "stop"
    assert answer.text == "a\ufffd"
    assert [one.token for _, one in entries_of(answer)] == tokens
    assert [token for piece in pieces for _, token in piece] == tokens


def test_what_a_stop_string_cuts_is_left_out(real_model: Model) -> None:
    tokens = real_model.tokenizer.encode("one two three four", special=False)
    answer, pieces = spoken(real_model, tokens, stop=("two three",))
    assert answer.text == "one "
    kept = [one.token for _, one in entries_of(answer)]
    assert kept == [token for piece in pieces for _, token in piece] == tokens[: len(kept)]
    assert len(kept) == 2


@pytest.fixture(scope="module")
def real_model() -> Model:
    from stretto.core.errors import UserError
    from stretto.models.load import load_model
    from stretto.models.source import packaged_model

    try:
        return load_model(str(packaged_model()), dtype="fp32", threads=1)
    except UserError as error:
        pytest.skip(str(error))
