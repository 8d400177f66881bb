"""The endpoints: forms of answers, streams that equal whole answers, sampling, tokens, models, metrics."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Running, until

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(text: str) -> list[Any]:
    """The data of a stream's events, in order."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def stream(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    reply = client.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return events(reply.text)


def joined(chunks: list[Any]) -> dict[int, tuple[str, str]]:
    """The text and the reason of each choice in a stream of chat or completion chunks."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in [] if chunk == "[DONE]" else chunk["choices"]:
            index = choice["index"]
            assert index not in reasons, "something came after the reason"
            piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            texts[index] = texts.get(index, "") + piece
            if choice["finish_reason"] is not None:
                reasons[index] = choice["finish_reason"]
    return {index: (texts[index], reasons[index]) for index in texts}


def test_a_chat_answer_has_the_form_of_openai(client: httpx.Client) -> None:
    body = post(client, CHAT, messages=user("ab"), max_tokens=5, temperature=0, ignore_eos=True)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "length"
    prompt = len("user:ab;>")
    why = "pages of 32 tokens are shared, and the prompt goes beyond none"
    details = {"cached_tokens": 0, "not_cached_because": why}
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
        "prompt_tokens_details": details,
    }


PROMPTS = st.text(st.characters(codec="utf-8", exclude_characters=" "), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=PROMPTS,
    seed=st.integers(-(2**63), 2**63 - 1),
    n=st.integers(1, 3),
    stop=st.lists(st.text("abcdefgXYZ!#%", min_size=1, max_size=2), max_size=3),
    most=st.integers(1, 30),
)
def test_the_deltas_of_a_stream_are_the_whole_text(
    client: httpx.Client, prompt: str, seed: int, n: int, stop: list[str], most: int
) -> None:
    common = {"seed": seed, "n": n, "stop": stop, "max_tokens": most, "temperature": 1.5}
    for path, asked in ((CHAT, {"messages": user(prompt)}), (TEXT, {"prompt": "a" + prompt})):
        whole = post(client, path, **asked, **common)
        chunks = stream(client, path, **asked, **common)
        texts = [c["message"]["content"] if path == CHAT else c["text"] for c in whole["choices"]]
        expected = {i: (text, whole["choices"][i]["finish_reason"]) for i, text in enumerate(texts)}
        assert joined(chunks) == expected
        assert chunks[-1] == "[DONE]"
        assert not any(string in text for string in stop for text in texts)
        if path == CHAT:
            assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in chunks[:n])
    whole = post(client, RESPONSES, input=prompt, seed=seed, stop=stop, max_output_tokens=most)
    chunks = stream(client, RESPONSES, input=prompt, seed=seed, stop=stop, max_output_tokens=most)
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(c["delta"] for c in chunks if c["type"] == "response.output_text.delta") == text
    assert chunks[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]
    assert chunks[-1]["response"]["status"] == whole["status"]
    assert [c["sequence_number"] for c in chunks] == list(range(len(chunks)))


def test_usage_comes_at_the_end_of_a_stream_when_asked_for(client: httpx.Client) -> None:
    body = {"messages": user("ab"), "max_tokens": 4, "ignore_eos": True}
    assert all("usage" not in chunk for chunk in stream(client, CHAT, **body)[:-1])
    chunks = stream(client, CHAT, **body, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == 4


def test_choices_use_one_seed_after_another(client: httpx.Client) -> None:
    common = {"prompt": ["ab", "cd"], "max_tokens": 12, "temperature": 2.0}
    several = post(client, TEXT, **common, n=3, seed=7)["choices"]
    assert [choice["index"] for choice in several] == list(range(6))
    assert len({choice["text"] for choice in several}) == 6
    for choice in range(3):
        alone = post(client, TEXT, **common, seed=7 + choice)["choices"]
        assert [c["text"] for c in alone] == [several[choice]["text"], several[3 + choice]["text"]]


def test_without_a_seed_answers_differ(client: httpx.Client) -> None:
    texts = {post(client, TEXT, prompt="ab", max_tokens=12, temperature=2)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_a_temperature_of_nearly_nothing_is_greedy(client: httpx.Client) -> None:
    greedy, nearly = (post(client, TEXT, prompt="ab", max_tokens=9, temperature=t) for t in (0, 5e-324))
    assert greedy["choices"] == nearly["choices"]


def test_an_answer_may_fill_the_context_and_no_more(client: httpx.Client) -> None:
    body = post(client, CHAT, messages=user("ab"), ignore_eos=True)
    assert body["usage"]["total_tokens"] == 256
    reply = client.post(TEXT, json={"prompt": "a" * 200, "max_tokens": 57})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "context_length_exceeded"
    for number in ("256", "200", "57", "257"):
        assert number in error["message"]


def test_token_ids_are_a_prompt_too(client: httpx.Client) -> None:
    tokens = post(client, "/tokenize", prompt="abc")["tokens"]
    common = {"max_tokens": 6, "temperature": 0}
    as_text = post(client, TEXT, prompt="abc", **common)
    for prompt in (tokens, [tokens]):
        body = post(client, TEXT, prompt=prompt, **common)
        assert (body["choices"], body["usage"]) == (as_text["choices"], as_text["usage"])


def test_messages_may_come_in_parts(client: httpx.Client) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    plain = [{"role": "system", "content": "ab"}]
    assert post(client, "/tokenize", messages=parts) == post(client, "/tokenize", messages=plain)


def test_tokens_go_there_and_back(client: httpx.Client) -> None:
    found = post(client, "/tokenize", prompt="abc<|im_end|>")
    assert found["count"] == len(found["tokens"]) == 4
    assert found["max_model_len"] == 256
    assert post(client, "/detokenize", tokens=found["tokens"])["prompt"] == "abc<|im_end|>"


def test_texts_that_can_never_fit_are_not_tokenised(client: httpx.Client) -> None:
    most = 256 * len("<|im_end|>")
    assert post(client, "/tokenize", prompt="a" * most)["count"] == most
    for path, asked in (
        ("/tokenize", {"prompt": "a" * (most + 1)}),
        (TEXT, {"prompt": ["a", "a" * (most + 1)]}),
        (CHAT, {"messages": user("a" * most)}),
        (RESPONSES, {"input": "a" * most}),
    ):
        reply = client.post(path, json=asked)
        assert reply.status_code == 400
        assert "characters" in reply.json()["error"]["message"]


def filled(field: str, item: str, size: int) -> str:
    items = ",".join([item] * (size // (len(item) + 1)))
    return f'{{"{field}":[{items}]}}'


def test_large_bodies_do_not_hold_up_the_others(server: Running, client: httpx.Client) -> None:
    """Each nearly as long as is allowed; meanwhile /health answers."""
    size = server.settings.max_body_bytes - 100
    bodies = {
        TEXT: [filled("prompt", item, size) for item in ("true", "1", "[]", "{}")],
        CHAT: [filled("messages", "{}", size)],
        "/tokenize": [json.dumps({"prompt": "1" * size})],
        "/detokenize": [filled("tokens", "5", size)],
    }
    slowest = 0.0
    done = threading.Event()

    def look() -> None:
        nonlocal slowest
        with server.client() as other:
            while not done.is_set():
                start = time.perf_counter()
                assert other.get("/health").status_code == 200
                slowest = max(slowest, time.perf_counter() - start)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for path, texts in bodies.items():
            for text in texts:
                client.post(path, content=text, headers={"Content-Type": "application/json"})
    finally:
        done.set()
        looking.join()
    assert slowest < 1.5


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny"]
    assert client.get("/v1/models/tiny").json() == listed[0]
    missing = client.get("/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    asked = client.post(CHAT, json={"model": "other", "messages": user("ab")})
    assert (asked.status_code, asked.json()["error"]["param"]) == (404, "model")


def metric_values(client: httpx.Client) -> dict[tuple[str, str], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, sample.labels.get("finished_reason", sample.labels.get("le", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_done(server: Running, client: httpx.Client) -> None:
    until(server.idle)
    before = metric_values(client)
    post(client, TEXT, prompt="abcd", max_tokens=6, n=2, ignore_eos=True)
    until(server.idle)
    after = metric_values(client)

    def grown(name: str, label: str = "") -> float:
        return after[f"stretto:{name}", label] - before[f"stretto:{name}", label]

    assert grown("prompt_tokens_total") == 8
    assert grown("generation_tokens_total") == 12
    assert grown("request_success_total", "length") == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 10
    assert grown("e2e_request_latency_seconds_count") == 2
    assert grown("request_queue_time_seconds_count") == 2
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"stretto:{gauge}", ""] == 0.0


def test_prompts_that_begin_alike_are_computed_once(server: Running, client: httpx.Client) -> None:
    prompt = "xyz" * 30
    first = post(client, TEXT, prompt=prompt, max_tokens=6, temperature=0)
    until(server.idle)
    before = metric_values(client)
    second = post(client, TEXT, prompt=[prompt, "ab"], n=2, max_tokens=6, temperature=0)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    until(server.idle)
    after = metric_values(client)
    grown = {name: after[name, ""] - before[name, ""] for name, label in after if "prefix_cache" in name and not label}
    assert grown["stretto:prefix_cache_queries_total"] == 184
    assert grown["stretto:prefix_cache_hits_total"] == 128
    answer = post(client, RESPONSES, input="xyz" * 30, max_output_tokens=3)
    again = post(client, RESPONSES, input="xyz" * 30, max_output_tokens=3)
    assert [one["usage"]["input_tokens_details"]["cached_tokens"] for one in (answer, again)] == [0, 96]


def test_answers_to_one_prompt_share_its_pages_though_they_come_at_once(server: Running, client: httpx.Client) -> None:
    prompt = "shared" * 20
    before = metric_values(client)["stretto:prompt_tokens_total", ""]
    body = post(client, TEXT, prompt=prompt, n=4, max_tokens=6, temperature=2.0, seed=3)
    until(server.idle)
    assert metric_values(client)["stretto:prompt_tokens_total", ""] - before == 120 + 3 * 24
    assert body["usage"]["prompt_tokens"] == 120
    why = "no prompt kept here begins with the same 32 tokens"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "not_cached_because": why}
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in body["choices"]}) == 4
    for index, choice in enumerate(body["choices"]):
        alone = post(client, TEXT, prompt=prompt, max_tokens=6, temperature=2.0, seed=3 + index)
        assert alone["choices"][0]["text"] == choice["text"]
        assert alone["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}


def test_the_live_view_shows_rows_and_passes(server: Running, client: httpx.Client) -> None:
    server.backend.seconds = 0.02
    with client.stream("POST", TEXT, json={"prompt": "abcd", "max_tokens": 60, "stream": True}) as reply:
        next(reply.iter_lines())
        view = client.get("/v1/stretto/live").json()
        assert view["running"] == 1
        assert view["kv"]["used_pages"] == 1
        assert (view["rows"][0]["prompt"], view["rows"][0]["limit"]) == (4, 60)
        assert client.get("/metrics").text.count("stretto:num_requests_running{") == 1
        assert metric_values(client)["stretto:num_requests_running", ""] == 1.0
    server.backend.seconds = 0.0
    until(server.idle)
    view = client.get("/v1/stretto/live").json()
    assert len(view["history"]) == 60
    assert view["passes"][0]["ms"] > 0
    assert {p["predicted_ms"] for p in view["passes"]} == {None}


def test_openapi_describes_every_path(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    for path in (CHAT, TEXT, RESPONSES, "/tokenize", "/detokenize", "/v1/models", "/health", "/metrics", "/version"):
        assert path in document["paths"]
    assert "422" not in json.dumps(document)


def test_ids_are_honoured_when_sane(client: httpx.Client) -> None:
    assert client.get("/version", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 200, "\u00e9", 'a"b'):
        given = client.get("/version", headers={"X-Request-Id": odd.encode()}).headers["x-request-id"]
        assert len(given) == 24


@pytest.mark.parametrize("path", ["/health", "/version"])
def test_small_answers(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200
