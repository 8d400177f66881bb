"""What clients get wrong: a 4xx with the field's name, never a 500, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from stretto.models.load import Model

from .conftest import Running, running, until

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
JSON = {"Content-Type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
USER = [{"role": "user", "content": "ab"}]


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"messages": USER, "max_tokens": 2, **fields}


def text(**fields: Any) -> tuple[str, Any]:
    return TEXT, {"prompt": "ab", "max_tokens": 2, **fields}


def responses(**fields: Any) -> tuple[str, Any]:
    return RESPONSES, {"input": "ab", "max_output_tokens": 2, **fields}


REFUSED = [
    (chat(messages=None), "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages="ab"), "messages"),
    (chat(messages=[1]), "messages.0"),
    (chat(messages=[{"role": "user"}]), "messages.0.content"),
    (chat(messages=[{"role": "robot", "content": "ab"}]), "messages.0.role"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages.0.content"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content.0.type"),
    (chat(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "messages.0.content.0.text"),
    (chat(temperature=-0.1), "temperature"),
    (chat(temperature="1"), "temperature"),
    (chat(temperature=True), "temperature"),
    (chat(temperature=1e300), "temperature"),
    (chat(temperature=float("inf")), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=1.01), "top_p"),
    (chat(top_k=-2), "top_k"),
    (chat(top_k=2.5), "top_k"),
    (chat(min_p=1.0), "min_p"),
    (chat(seed=2**63), "seed"),
    (chat(seed="a"), "seed"),
    (chat(n=0), "n"),
    (chat(n=129), "n"),
    (chat(n=100), "n"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=1.5), "max_tokens"),
    (chat(max_tokens=10**30), "max_tokens"),
    (chat(max_tokens=255), "max_tokens"),
    (chat(max_completion_tokens=255), "max_completion_tokens"),
    (chat(messages=[{"role": "user", "content": "a" * 300}]), "messages"),
    (chat(stop=[""]), "stop.0"),
    (chat(stop=["a"] * 17), "stop"),
    (chat(stop=5), "stop"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (chat(logprobs=1), "logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logit_bias={"5": 1}), "logit_bias"),
    (chat(presence_penalty=0.5), "presence_penalty"),
    (chat(frequency_penalty=-1), "frequency_penalty"),
    (chat(repetition_penalty=1.1), "repetition_penalty"),
    (chat(tools=[{"type": "function"}]), "tools"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(priority=1.5), "priority"),
    (chat(priority=2**31), "priority"),
    (chat(timeout=0), "timeout"),
    (chat(timeout=1e9), "timeout"),
    (chat(model=5), "model"),
    (text(prompt=None), "prompt"),
    (text(prompt=""), "prompt"),
    (text(prompt=[]), "prompt"),
    (text(prompt=[[]]), "prompt"),
    (text(prompt=["ab", ""]), "prompt"),
    (text(prompt=[[101]]), "prompt"),
    (text(prompt=[-1]), "prompt.0"),
    (text(prompt={"a": 1}), "prompt"),
    (text(prompt=["a", 1]), "prompt.0"),
    (text(prompt=["a"] * 60), "prompt"),
    (text(prompt=["a"] * 30, n=2), "n"),
    (text(guided_regex="a{" + "9" * 5000 + "}"), "guided_regex"),
    (text(prompt=["a"] * 129), "prompt.0"),
    (text(prompt="a" * 300), "prompt"),
    (text(echo=True), "echo"),
    (text(logprobs=6), "logprobs"),
    (text(logprobs=True), "logprobs"),
    (text(best_of=3), "best_of"),
    (text(suffix="x"), "suffix"),
    (responses(input=5), "input"),
    (responses(input=[]), "input"),
    (responses(input="a" * 300), "input"),
    (responses(max_output_tokens=255), "max_output_tokens"),
    (responses(previous_response_id="resp_1"), "previous_response_id"),
    (responses(background=True), "background"),
    (responses(include=["reasoning.encrypted_content"]), "include.0"),
    (responses(top_logprobs=21), "top_logprobs"),
    (responses(text={"format": {"type": "json_schema"}}), "text.format.schema"),
    (("/tokenize", {}), None),
    (("/tokenize", {"prompt": "a", "messages": USER}), None),
    (("/detokenize", {"tokens": ["a"]}), "tokens.0"),
    (("/detokenize", {"tokens": [-1]}), "tokens.0"),
]

BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff"}',
    "a number": b"5",
    "a list": b"[1]",
    "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "minus infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "deep": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep in an unknown field": b'{"prompt": "a", "x": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    "a huge number": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "trailing": b'{"prompt": "a"} x',
    "a zero byte": b'{"prompt": "a"}\x00',
}

TOLERATED = [
    chat(logit_bias={}, presence_penalty=0, frequency_penalty=0.0, logprobs=False, tools=[], response_format=None),
    chat(response_format={"type": "text"}, user="me", metadata={"a": "b"}, unheard_of=[1, {"a": None}]),
    chat(stop=None, seed=None, temperature=None, top_k=-1, top_p=1, n=None, stream=None, model=None),
    chat(messages=[{"role": "user", "content": "a\u0000b"}]),
    chat(messages=[{"role": "user", "content": "\U0001f600\ufeff\u202e\uffff"}, {"role": "assistant", "content": ""}]),
    text(prompt="a<|im_end|>", best_of=1, echo=False, suffix=None, logprobs=None),
    text(stop="x" * 1000, seed=-(2**63), temperature=1e-300),
    text(seed=2**63 - 1, n=2),
    text(priority=-5, timeout=86_400),
    responses(store=True, tools=[], truncation="disabled", include=[]),
]


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    with running(chat_model, max_queue=50, max_body_bytes=200_000) as found:
        yield found
        until(found.idle)
        found.service.engine.scheduler.pool.audit()
        with found.client() as client:
            assert client.get("/health").status_code == 200


def check_error(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 500
    return error


@pytest.mark.parametrize(("asked", "param"), REFUSED, ids=lambda v: str(v)[:60])
def test_a_wrong_field_is_named(client: httpx.Client, asked: tuple[str, Any], param: str | None) -> None:
    path, body = asked
    # An infinity leaves as a number that no double holds; JSON has no other way to send one.
    content = json.dumps(body).replace("Infinity", "1e999")
    error = check_error(client.post(path, content=content, headers=JSON))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    if "stream" not in body and body:
        assert client.post(path, content=content[:-1] + ', "stream": true}', headers=JSON).status_code == 400


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_a_body_that_is_no_request(client: httpx.Client, body: bytes) -> None:
    for path in (CHAT, TEXT, RESPONSES, "/tokenize", "/detokenize"):
        check_error(client.post(path, content=body, headers=JSON))


@pytest.mark.parametrize("asked", TOLERATED, ids=lambda v: str(v)[:60])
def test_what_changes_nothing_is_tolerated(client: httpx.Client, asked: tuple[str, Any]) -> None:
    path, body = asked
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "a b"])
def test_only_json_is_taken(client: httpx.Client, kind: str) -> None:
    content = json.dumps({"prompt": "ab"}).encode()
    error = check_error(client.post(TEXT, content=content, headers={"Content-Type": kind} if kind else {}))
    assert "application/json" in error["message"]


def test_a_body_that_is_too_long(client: httpx.Client) -> None:
    check_error(client.post(TEXT, content=b" " * 200_001, headers=JSON), 413)
    check_error(client.post(TEXT, content=iter([b" " * 100_000] * 3), headers=JSON), 413)


def test_paths_and_methods(client: httpx.Client) -> None:
    check_error(client.get("/v1/nothing"), 404)
    check_error(client.get("/../etc/passwd"), 404)
    check_error(client.get(TEXT), 405)
    check_error(client.post("/health"), 405)


def raw(server: Running, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):  # a server that closes before it has read all resets
            while piece := sock.recv(65536):
                received += piece
    return received


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
        POST + b"Content-Length: 10\r\nContent-Type: application/json\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /%ff%00%0d%0a HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_broken_http_breaks_nothing(server: Running, data: bytes) -> None:
    assert b" 500 " not in raw(server, data).split(b"\r\n")[0]
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_a_body_that_never_comes(chat_model: Model) -> None:
    with running(chat_model, body_seconds=0.2) as server:
        head = POST + b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(head)
            assert b" 400 " in sock.recv(65536).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "127.1.2.3", "box.example", ""]
)
def test_a_local_server_answers_to_its_own_names(chat_model: Model, host: str) -> None:
    with running(chat_model, allowed_hosts=("Box.example",)) as found, found.client() as client:
        assert client.get("/version", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1"])
def test_a_name_that_was_made_to_lead_here_is_refused(client: httpx.Client, host: str) -> None:
    answer = client.post(TEXT, json={"prompt": "ab"}, headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")
