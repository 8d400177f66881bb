"""Loads from files and from seeds: every published format, and a line for every mistake."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from stretto.core.errors import UserError
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import LoadSpec
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.traces import read_trace

TEXTS = {
    "own.csv": "arrival_s,prompt_tokens,output_tokens\n1.5,300,20\n1.25,100,10\n4.0,7,1\n",
    "splitwise.csv": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,10\n0.25,300,20\n2.75,7,1\n",
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,100,10\n"
    "2023-11-16 18:15:46.9305900,300,20\n2023-11-16 18:15:49.4305900,7,1\n",
    "azure-2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,100,10\n"
    "2024-05-10 00:00:00.259930+00:00,300,20\n2024-05-10 02:00:02.759930+02:00,7,1\n",
    "apex.jsonl": '{"StartTimeOffset": 1000000000, "ContextTokens": 100, "GeneratedTokens": 10}\n\n'
    '{"StartTimeOffset": 1250000000, "ContextTokens": 300, "GeneratedTokens": 20}\n'
    '{"StartTimeOffset": 3750000000, "ContextTokens": 7, "GeneratedTokens": 1}\n',
    "apex.csv": "StartTimeOffset,ContextTokens,GeneratedTokens\n0,100,10\n250000000,300,20\n2750000000,7,1\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 100, "output_length": 10, "hash_ids": [1]}\n'
    '{"timestamp": 250, "input_length": 300, "output_length": 20, "hash_ids": [1, 2]}\n'
    '{"timestamp": 2750, "input_length": 7, "output_length": 1, "hash_ids": []}\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_formats_hold_the_same_requests(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXTS[name])
    load = read_trace(tmp_path / name)
    assert load.prompt.tolist() == [100, 300, 7]
    assert load.output.tolist() == [10, 20, 1]
    assert load.arrival_s.tolist() == pytest.approx([0.0, 0.25, 2.75], abs=1e-6)
    assert len(read_trace(tmp_path / name, most=2)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "arrival_s,prompt_tokens,output_tokens\n0,1,1\n0,x,1\n",
            "bad:3: prompt_tokens: the value is 'x'; it must be a",
        ),
        (
            "arrival_s,prompt_tokens,output_tokens\n0,1,0\n",
            "bad:2: output_tokens: the value is '0'; it must be a whole",
        ),
        ("arrival_s,prompt_tokens,output_tokens\n0,1.5,2\n", "bad:2: prompt_tokens: the value is '1.5'"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,2\n", "bad:2: arrival_s: the value is 'nan'; it must be a time"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1e99\n", "bad:2: output_tokens: the value is '1e99'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1\n", "bad:2: the line has not as many fields"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,2,3\n", "bad:2: the line has not as many fields"),
        (
            "arrival_s,prompt_tokens,output\n0,1,2\n",
            "bad:2: the fields are arrival_s, prompt_tokens, output; they must",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "bad:2: TIMESTAMP: the value is 'yesterday'"),
        (
            '{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0}\n',
            "bad:2: input_length: the value",
        ),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', "bad:2: not a JSON object"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{oops\n', "bad:2: not a JSON object"),
        ("", "bad: the trace holds no request"),
        ("arrival_s,prompt_tokens,output_tokens\n", "bad: the trace holds no request"),
    ],
)
def test_a_mistake_names_its_line(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad").write_text(text)
    with pytest.raises(UserError) as told:
        read_trace("bad")
    assert str(told.value).startswith(expected)


def test_mooncakes_hashes_tell_what_prompts_share(tmp_path: Path) -> None:
    lines = [
        '{"timestamp": 5, "input_length": 600, "output_length": 1, "hash_ids": [7, 8]}\n',
        '{"timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [7, 9, 10]}\n',
        '{"timestamp": 9, "input_length": 5, "output_length": 1}\n',
    ]
    (tmp_path / "m").write_text("".join(lines))
    load = read_trace(tmp_path / "m")
    assert load.prefixes == ((7, 9, 10), (7, 8), ())
    assert load.block_tokens == 512
    assert load_of(LoadSpec(trace=str(tmp_path / "m"), rate_per_s=1.0)).prefixes == load.prefixes
    first, second, third = (load.page_hashes(request, 100) for request in range(3))
    assert [len(pages) for pages in (first, second, third)] == [11, 6, 0]  # whole pages of the prompts
    assert first[:5] == second[:5]  # those that end within the first 512 tokens
    assert first[5] != second[5]  # one that ends in the next block tells that block, and all before it
    assert len(set(first)) == 11
    (tmp_path / "m").write_text("".join(lines[2:]))
    assert read_trace(tmp_path / "m").prefixes == ()


@pytest.mark.parametrize("page", [1, 16, 100, 512, 600])
def test_equal_hashes_are_equal_texts(page: int) -> None:
    """The hashes of pages against the texts that are made up for the same blocks."""
    load = Load(
        np.zeros(5),
        np.array([1100, 600, 1100, 513, 1200]),
        np.ones(5, np.int64),
        ((7, 9, 10), (7, 8), (7, 9, 11), (7, 9), ()),
        512,
    )
    texts = [load.tokens(request, range(100, 1100)) for request in range(5)]
    assert [len(text) for text in texts] == load.prompt.tolist()
    told = [load.page_hashes(request, page) for request in range(5)]
    for a, b in itertools.product(range(4), range(4)):
        for i, (x, y) in enumerate(zip(told[a], told[b], strict=False)):
            assert (x == y) == (texts[a][: (i + 1) * page] == texts[b][: (i + 1) * page])
    assert told[4] == []


def test_a_hash_that_is_no_number_is_told(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"timestamp": 5, "input_length": 600, "output_length": 1, "hash_ids": [7, "x"]}\n')
    with pytest.raises(UserError, match=r"m:1: hash_ids: the value is .*; it must be a list of whole numbers, one for"):
        read_trace(tmp_path / "m")


def test_a_trace_that_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such trace"):
        load_of(LoadSpec(trace=str(tmp_path / "none.csv")))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_trace(tmp_path / "binary")


def test_a_rate_stretches_a_trace(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(TEXTS["own.csv"])
    load = load_of(LoadSpec(trace=str(tmp_path / "own.csv"), rate_per_s=4.0))
    assert load.arrival_s.tolist() == pytest.approx([0.0, 0.25 / 5.5, 0.5])


def test_drawn_loads_have_the_rate_and_lengths_that_are_asked_for() -> None:
    asked = LoadSpec(requests=20000, rate_per_s=8.0, prompt_tokens=500, output_tokens=100, spread=0.5, seed=3)
    load, again = load_of(asked), load_of(LoadSpec(**{**vars_of(asked), "seed": 3}))
    assert np.array_equal(load.arrival_s, again.arrival_s)
    assert len(load) / load.arrival_s[-1] == pytest.approx(8.0, rel=0.03)
    assert load.prompt.mean() == pytest.approx(500, rel=0.02)
    assert load.prompt.std() == pytest.approx(250, rel=0.05)
    assert load.output.mean() == pytest.approx(100, rel=0.02)
    other = load_of(LoadSpec(**{**vars_of(asked), "seed": 4}))
    assert not np.array_equal(load.prompt, other.prompt)


def vars_of(spec: LoadSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def test_even_and_simultaneous_arrivals() -> None:
    even = load_of(LoadSpec(requests=4, arrivals="even", rate_per_s=2.0))
    assert even.arrival_s.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert load_of(LoadSpec(requests=4, arrivals="at_once")).arrival_s.tolist() == [0.0] * 4


def test_turns_of_a_conversation_hold_what_was_said_before() -> None:
    load = load_of(LoadSpec(requests=3, turns=3, arrivals="at_once", prompt_tokens=100, output_tokens=10, think_s=5.0))
    assert load.prompt.tolist() == [100, 210, 320]
    assert load.arrival_s.tolist() == [0.0, 5.0, 10.0]
    first, second = (load.page_hashes(request, 16) for request in (0, 1))
    assert first == second[:6]
    assert len(second) == 13


def test_conversations_share_nothing_with_each_other() -> None:
    load = load_of(LoadSpec(requests=4, turns=2, arrivals="at_once", prompt_tokens=100, output_tokens=10, think_s=5.0))
    told = [load.page_hashes(request, 16)[0] for request in range(4)]
    assert told[:2] == told[2:]
    assert told[0] != told[1]
    assert load_of(LoadSpec(requests=4, arrivals="at_once")).page_hashes(0, 16) == []
    assert load.only([1, 3]).prefixes == (load.prefixes[1], load.prefixes[3])
    assert load.only([1, 3]).prompt.tolist() == load.prompt[[1, 3]].tolist()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "requests is None; it must be given where there is no trace"),
        ({"requests": 3}, "rate_per_s is None; it must be given where arrivals are drawn"),
        ({"requests": 0, "rate_per_s": 1.0}, "requests is 0"),
        ({"requests": 3, "rate_per_s": 0.0}, "rate_per_s is 0.0"),
        ({"requests": 3, "rate_per_s": 1.0, "turns": 0}, "turns is 0"),
        ({"requests": 3, "rate_per_s": 1.0, "spread": -1.0}, "spread is -1.0"),
    ],
)
def test_what_cannot_be_drawn_is_told(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LoadSpec(**fields)  # type: ignore[arg-type]


def test_loads_that_cannot_be_are_refused() -> None:
    ones = np.ones(2, np.int64)
    with pytest.raises(ValueError, match="arrival_s is 'out of order'"):
        Load(np.array([1.0, 0.0]), ones, ones)
    with pytest.raises(ValueError, match="output is 0; it must be at least 1 token"):
        Load(np.zeros(2), ones, ones * 0)
    assert [own.tolist() for own in Load(np.zeros(2), ones, ones).dealt(3)] == [[0], [1], []]


def test_a_trace_that_is_too_long_is_not_cut_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stretto.serve.deploy.traces.MAX_REQUESTS", 2)
    (tmp_path / "own.csv").write_text(TEXTS["own.csv"])
    with pytest.raises(UserError, match="the trace is too long; at most 2 requests"):
        read_trace(tmp_path / "own.csv")
    assert len(read_trace(tmp_path / "own.csv", most=2)) == 2
