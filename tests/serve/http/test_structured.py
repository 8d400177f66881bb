"""Answers bound to a form, over HTTP: the fields that ask for it, errors that name them, and the others meanwhile."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import httpx
import pytest

pytest.importorskip("llguidance")

import stretto
from stretto.core.errors import UserError
from stretto.serve.grammar import MOST_SECONDS, CompiledGrammar, Grammars, GrammarSource
from stretto.serve.http.compiling import PATIENCE_S

from .conftest import Running, until
from .test_api import CHAT, RESPONSES, TEXT, joined, post, stream, user
from .test_bad_input import check_error

SCHEMA = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}
NAMED = {"name": "letters", "schema": SCHEMA, "strict": True}
LETTERS = re.compile(r'\["[ab]"(,"[ab]"){0,2}\]')
# The tiny model has no token for a blank, so that its schemas get along without one.
ASKS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "schema": {"enum": [17]}}}}, "17"),
    (TEXT, {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "schema": {"const": "xy"}}}}, '"xy"'),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"enum": [17]}}}}, "17"),
    (CHAT, {"guided_json": {"enum": [True]}}, "true"),
    (TEXT, {"guided_json": '{"enum": [true]}'}, "true"),
    (CHAT, {"guided_regex": "[0-9]{3}x"}, "[0-9]{3}x"),
    (TEXT, {"guided_choice": ["one", "two"]}, "one|two"),
    (RESPONSES, {"guided_grammar": 'start: "a" /[bc]+/ "d"'}, "a[bc]+d"),
    (TEXT, {"structured_outputs": {"regex": "x{2,4}y"}}, "x{2,4}y"),
    (CHAT, {"structured_outputs": {"choice": ["one"]}}, "one"),
    (CHAT, {"response_format": {"type": "json_object"}, "stop": ["}"]}, r"\{.*"),
]


def asked(path: str, **fields: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"temperature": 1.0, "seed": 5, **fields}
    if path == RESPONSES:
        return {"input": "ab", "max_output_tokens": 60, **common}
    return {"max_tokens": 60, **({"messages": user("ab")} if path == CHAT else {"prompt": "ab"}), **common}


def text_of(path: str, body: Any) -> str:
    if path == RESPONSES:
        return str(body["output"][0]["content"][0]["text"])
    choice = body["choices"][0]
    return str(choice["message"]["content"] if path == CHAT else choice["text"])


@pytest.mark.parametrize(("path", "fields", "pattern"), ASKS, ids=lambda value: str(value)[:40])
def test_answers_have_the_form_that_was_asked_for(
    client: httpx.Client, path: str, fields: dict[str, Any], pattern: str
) -> None:
    whole = text_of(path, post(client, path, **asked(path, **fields)))
    assert re.fullmatch(pattern, whole, re.DOTALL)
    chunks = stream(client, path, **asked(path, **fields))
    if path == RESPONSES:
        assert chunks[-1]["response"]["output"][0]["content"][0]["text"] == whole
        assert chunks[-1]["response"]["text"]["format"]["type"] in ("text", "json_schema")
    else:
        assert joined(chunks)[0][0] == whole


def test_each_choice_has_a_state_of_its_own(client: httpx.Client) -> None:
    body = post(client, TEXT, **asked(TEXT, n=4, guided_regex="[a-z]{2,20}[0-9]", logprobs=2))
    texts = [choice["text"] for choice in body["choices"]]
    assert all(re.fullmatch("[a-z]{2,20}[0-9]", text) for text in texts)
    assert len(set(texts)) > 1
    assert {choice["finish_reason"] for choice in body["choices"]} == {"stop"}
    assert "".join(body["choices"][0]["logprobs"]["tokens"]) == texts[0]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "schema": {"type": "robot"}}}},
        "response_format.json_schema.schema",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {**NAMED, "name": "a b"}}},
        "response_format.json_schema.name",
    ),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}},
        "text.format.schema",
    ),
    (TEXT, {"guided_json": "{"}, "guided_json"),
    (TEXT, {"guided_json": 5}, "guided_json"),
    (TEXT, {"guided_regex": "a("}, "guided_regex"),
    (TEXT, {"guided_regex": "(a{1000}){1000}"}, "guided_regex"),
    (TEXT, {"guided_choice": []}, "guided_choice"),
    (TEXT, {"guided_choice": [""]}, "guided_choice.0"),
    (TEXT, {"guided_grammar": "start: nobody"}, "guided_grammar"),
    (TEXT, {"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
    (TEXT, {"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.json_object"),
    (TEXT, {"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
]


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_followed_is_a_400_that_names_its_field(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    error = check_error(client.post(path, json=asked(path, **fields)))
    assert error["param"] == param
    assert check_error(client.post(path, json=asked(path, **fields, stream=True)))["param"] == param


def test_the_others_go_on_while_a_grammar_is_compiled(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Grammars._compile

    def slowly(self: Grammars, source: GrammarSource) -> CompiledGrammar:
        time.sleep(PATIENCE_S / 4)
        return compiled(self, source)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    replies: list[httpx.Response] = []

    def bound(number: int) -> None:
        with server.client() as client:
            replies.append(client.post(TEXT, json=asked(TEXT, guided_regex=f"a{{{number}}}")))

    threads = [threading.Thread(target=bound, args=(number,)) for number in range(1, 8)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with server.client() as client:
        while any(thread.is_alive() for thread in threads):
            start = time.perf_counter()
            assert client.post(TEXT, json=asked(TEXT, max_tokens=2)).status_code == 200
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < PATIENCE_S / 4
    codes = sorted(reply.status_code for reply in replies)
    assert codes[0] == 200
    assert codes[-1] == 503  # seven take longer than anybody waits
    assert {reply.json()["error"]["code"] for reply in replies if reply.status_code == 503} == {"busy"}
    until(lambda: not server.service.live)


def test_who_takes_long_itself_is_told_so(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    post(client, TEXT, **asked(TEXT, guided_regex="ab"))  # whatever came before is compiled by then
    monkeypatch.setattr("stretto.serve.http.compiling.PATIENCE_S", 0.3)
    monkeypatch.setattr("stretto.serve.http.compiling.MOST_SECONDS", 0.2)
    monkeypatch.setattr(Grammars, "_compile", lambda self, source: time.sleep(0.6))
    error = check_error(client.post(TEXT, json=asked(TEXT, guided_regex="abc")))
    assert error["param"] == "guided_regex"
    assert "too long" in error["message"]


def test_what_takes_too_long_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr("stretto.serve.grammar.time.thread_time", lambda: next(clock) * MOST_SECONDS)
    with pytest.raises(UserError, match="too complex"):
        Grammars(server.service.tokenizer, 101).compile(GrammarSource(kind="regex", text="a"))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_grammar_that_becomes_too_complex_ends_its_own_answer_alone(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr("stretto.serve.grammar.MOST_MASK_SECONDS", 0.0)
    reply = client.post(TEXT, json=asked(TEXT, guided_regex="a{9}", stream=streamed))
    assert reply.status_code == (200 if streamed else 400)
    assert "grammar_too_complex" in reply.text
    assert client.post(TEXT, json=asked(TEXT)).status_code == 200


def test_the_offline_class_keeps_to_a_schema(chat_folder: object) -> None:
    llm = stretto.LLM(str(chat_folder), dtype="fp32", threads=1, slots=3)
    how = stretto.Sampling(temperature=1.0, seed=3)
    for answer in llm.generate(["ab", "cd"], how, max_tokens=60, json_schema={"type": "integer", "maximum": 10**6}):
        assert isinstance(json.loads(answer.text), int)
    [answer] = llm.chat(user("ab"), how, max_tokens=60, regex="[xy]{3}")
    assert re.fullmatch("[xy]{3}", answer.text)
    with pytest.raises(UserError, match="Invalid type"):
        llm.generate("ab", json_schema={"type": "robot"})
    with pytest.raises(UserError, match="one form"):
        llm.generate("ab", json_schema={}, regex="a")
