"""The packaged GGUF's tokenizer against transformers' reading of it; streams; templates in their sandbox."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from stretto.core.errors import UserError
from stretto.models.chat import render_chat
from stretto.models.gguf_file import read_gguf
from stretto.models.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "  leading and   inner spaces \n\n\ttabs\r\n",
    "def f(x):\n    return x ** 2  # it's 1234567890, 3.14159\n",
    "Z\u00fcrich na\u00efve \u2014 \u201cquotes\u201d \u4f60\u597d\uff0c\u4e16 \u0645\u0631\u062d\u0628",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00e9 \x00 \ufffd",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<|im_",
    "I'll we've DON'T 'tis 12a34",
]
NUMBERS = "\u00bd x\u00b2 \u0661\u0662\u0663 12a34, \u00be cup"
TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def tokenizer(packaged: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf(packaged).metadata, file=str(packaged))


@pytest.fixture(scope="module")
def peer(packaged: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(packaged.parent), gguf_file=packaged.name)


@pytest.mark.slow
def test_ids_and_texts_are_those_of_transformers(tokenizer: Tokenizer, peer: Any) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text), text
        assert tokenizer.decode(ids, skip_special=False) == peer.decode(ids, skip_special_tokens=False)
    # transformers' reading of a GGUF leaves out the rule by which SmolLM splits each number sign (visible where one
    # is no ASCII digit), so it is put back before it is asked.
    peer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in (*TEXTS, NUMBERS):
        assert tokenizer.encode(text) == peer.encode(text), text
    for reply in (True, False):
        assert tokenizer.chat(TALK, reply=reply) == peer.apply_chat_template(
            TALK, tokenize=False, add_generation_prompt=reply
        )


def test_frozen_ids(tokenizer: Tokenizer) -> None:
    """Written out by hand from the vocabulary; the slow tier compares with transformers."""
    assert tokenizer.encode("The capital of France is Paris.") == [504, 3575, 282, 4649, 314, 7042, 30]
    assert tokenizer.encode("a 1234") == [81, 216, 33, 34, 35, 36]
    assert tokenizer.encode("<|im_start|>hi") == [1, 6004]


def test_tokens_spell_the_bytes_of_their_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, special=False)
        if tokenizer.decode(ids, skip_special=False) == text:
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert {0, 1, 2} <= tokenizer.special_ids
    assert tokenizer.token_bytes(49152) == tokenizer.token_bytes(-1) == b""


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]), b" a\xe2b"),
        (decoders.Metaspace(), b" a\xe2b"),
        (decoders.WordPiece(), b"\xe2\x96\x81a<0xE2>b"),
        (None, b"\xe2\x96\x81a<0xE2>b"),
    ],
)
def test_bytes_follow_the_decoders_rule(decoder: Any, expected: bytes) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"\u2581a": 0, "<0xE2>": 1, "b": 2}, []))
    if decoder is not None:
        backend.decoder = decoder
    assert b"".join(map(Tokenizer(backend, file="made up").token_bytes, range(3))) == expected


def test_ends_and_sizes(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == {0, 2}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.size == 49152


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=60))
def test_text_survives_and_streams_as_it_decodes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, special=False)
    decoded = tokenizer.decode(ids, skip_special=False)
    if text.isprintable():
        assert decoded == text
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == decoded
    if "\ufffd" not in decoded:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(17, 49151), max_size=30))
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9d9", special=False)
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["\U0001f9d9"]


def test_a_folder_reads_its_own_settings(tmp_path: Path, tiny_tokenizer_json: str) -> None:
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer_json)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|im_end|>"}}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    read = Tokenizer.from_folder(tmp_path)
    assert read.eos_ids == {5, 7, 95}
    assert read.bos_id == 95
    assert read.chat(TALK) == "<|im_end|>What is 2+2?"
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "llama"}, "'llama'"),
        ({"tokenizer.ggml.pre": "mystery"}, "'mystery'"),
        ({"tokenizer.ggml.tokens": None}, "vocabulary"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "broken"),
    ],
)
def test_other_vocabularies_are_refused(change: dict[str, Any], says: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
    }
    assert Tokenizer.from_gguf(metadata).encode("ab") == [0, 1]
    with pytest.raises(UserError, match=says):
        Tokenizer.from_gguf({**metadata, **change})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% for a in range(60000) %}{{ messages[0].content }}{{ 'x' }}{% endfor %}",
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "x" * 300_000,
    ],
)
def test_templates_that_break_out_or_never_end_are_stopped(template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        render_chat(template, TALK, file="m.gguf", variables={})


def test_templates_may_use_what_transformers_gives_them() -> None:
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    assert render_chat(template, TALK, file="m", variables={}) == '{"role": "user", "content": "What is 2+2?"}'


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(a='xxxxxxxx') %}" + "{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ 'x'.zfill(10000000000) }}",
        "{{ '%10000000000d' % 5 }}",
        "{{ '%*d' % (10000000000, 5) }}",
        "{{ '{:>10000000000}'.format('x') }}",
        "{{ '{:>{}}'.format('x', 10000000000) }}",
        "{{ '%10000000000d' | format(5) }}",
        "{% set s = 'x' | center(9000) %}{{ s.replace('x', s).replace(' ', s) }}",
        "{{ [1] | slice(10000000000) | list }}",
        "{% set s = 'x' | center(9000) %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}"
        + "{% endfor %}" * 2,
    ],
)
def test_templates_can_neither_grow_nor_loop_without_end(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="its chat template failed"):
        render_chat(template, TALK, file="m", variables={})
    assert time.monotonic() - began < 10


def test_what_templates_use_works_as_in_jinja() -> None:
    template = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length }}{{ ',' if not loop.last }}{% endfor %}"
        "{{ none ~ nothing ~ 1.5 }}{{ 'a-b' | replace('-', '+') }}{{ 'x'.center(3) }}{{ '%s=%03d' % ('n', 7) }}"
        "{{ '{}:{:>4}'.format('k', 'v') }}{{ [1, 2, 3] | batch(2) | list | length }}"
    )
    assert render_chat(template, TALK, file="m", variables={}) == "1/3,2/3,3/3None1.5a+b x n=007k:   v2"
