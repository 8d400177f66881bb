"""Answers bound to grammars: what is compiled and what refused, what masks let through, a real model held to them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance")

from stretto.core.clock import RealClock  # noqa: E402
from stretto.core.errors import UserError  # noqa: E402
from stretto.core.faults import BackendCrash  # noqa: E402
from stretto.core.record import Recorder  # noqa: E402
from stretto.models.load import Model, load_model  # noqa: E402
from stretto.models.source import packaged_model  # noqa: E402
from stretto.serve.choosing import allowed_tokens  # noqa: E402
from stretto.serve.engine import Engine  # noqa: E402
from stretto.serve.grammar import JSON_OBJECT, Grammars, GrammarSource, nested_repeats  # noqa: E402
from stretto.serve.local import LocalBackend  # noqa: E402
from stretto.serve.request import Answer, Request  # noqa: E402
from stretto.serve.sampling import Sampling  # noqa: E402
from stretto.serve.scheduler import Scheduler  # noqa: E402
from stretto.serve.scheduler_config import SchedulerConfig  # noqa: E402
from stretto.serve.text import AnswerText  # noqa: E402

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"enum": ["yes", "no", None, 7]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"const": {"a": [1, 2]}}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
]


@pytest.fixture(scope="module")
def model() -> Model:
    try:
        return load_model(str(packaged_model()), dtype="fp32", path="exact", threads=2)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def grammars(model: Model) -> Grammars:
    return Grammars(model.tokenizer, model.spec.vocab)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def follows(grammars: Grammars, model: Model, source: GrammarSource, text: str) -> bool:
    """Whether a text may be said from its first to its last token, and may end there."""
    state = grammars.compile(source).start()
    for token in model.tokenizer.encode(text, special=False):
        if token not in allowed_tokens(state.mask, model.spec.vocab):
            return False
        ended = state.accept(token)
        if ended is not None:
            return ended == "stop"
    return bool(set(allowed_tokens(state.mask, model.spec.vocab).tolist()) & model.tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        (
            GrammarSource.json_schema(PERSON),
            '{"name": "Z\u00fc", "age": 7, "tags": ["red"]}',
            '{"name": "", "age": 121',
        ),
        (GrammarSource.json_schema(json.dumps(PERSON)), '{"name": "", "age": 0, "tags": []}', '{"name": "",  "age"'),
        (JSON_OBJECT, '{"a": [1, {"b": null}]}', "[1]"),
        (GrammarSource(kind="regex", text=r"[a-z]{3}-\d+"), "abc-15", "abc-"),
        (GrammarSource.choice(['a "quoted"\n', "gr\u00fcn", "/x/"]), 'a "quoted"\n', "gr"),
        (GrammarSource.choice(["gr\u00fcn", "gr"]), "gr", "gra"),
        (GrammarSource(kind="grammar", text='start: "(" start ")" | "x"'), "((x))", "((x)"),
    ],
)
def test_what_fits_may_be_said_and_nothing_else(
    grammars: Grammars, model: Model, source: GrammarSource, right: str, wrong: str
) -> None:
    assert follows(grammars, model, source, right)
    assert not follows(grammars, model, source, wrong)


def test_every_token_that_ends_an_answer_may_end_it_and_only_where_it_may_end(grammars: Grammars, model: Model) -> None:
    state = grammars.compile(GrammarSource(kind="regex", text="a+")).start()
    [a] = model.tokenizer.encode("a", special=False)
    assert not set(allowed_tokens(state.mask, model.spec.vocab).tolist()) & model.tokenizer.eos_ids
    assert state.accept(a) is None
    assert model.tokenizer.eos_ids <= set(allowed_tokens(state.mask, model.spec.vocab).tolist())
    assert state.accept(max(model.tokenizer.eos_ids)) == "stop"
    assert grammars.compile(GrammarSource(kind="regex", text="a+")).start().accept(a) is None  # states are apart


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema]}
    return schema


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (GrammarSource.json_schema({"type": "robot"}), "Invalid type: robot"),
        (GrammarSource.json_schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (GrammarSource.json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (GrammarSource.json_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        (GrammarSource.json_schema({"$ref": "#"}), "cannot be followed"),
        (GrammarSource.json_schema("{"), "not valid JSON"),
        (GrammarSource.json_schema("[1]"), "no JSON schema; an object"),
        (GrammarSource.json_schema("[" * 60_000), "not valid JSON"),
        (GrammarSource.json_schema(deep(30)), "deeper than 48 levels"),
        (GrammarSource.json_schema({"enum": ["x" * 70_000]}), "at most 65536 are read"),
        (GrammarSource.json_schema({"type": "string", "pattern": "(a{1000}){1000}"}), "repeats too much"),
        (GrammarSource.json_schema({"patternProperties": {"((a{99}){99}){99}": {}}}), "repeats too much"),
        (GrammarSource(kind="regex", text="a("), "unclosed group"),
        (GrammarSource(kind="regex", text="(a{1000}){1000}"), "repeats too much"),
        (GrammarSource(kind="regex", text="a{" + "1" * 5000 + "}"), "repeats too much"),
        (GrammarSource(kind="regex", text="(" * 9000 + ")" * 7000), "cannot be followed"),
        (GrammarSource(kind="regex", text="a" * 20_000), "at most 16384"),
        (GrammarSource(kind="grammar", text="start: nobody"), "nobody"),
        (GrammarSource(kind="grammar", text=""), "cannot be followed"),
        (GrammarSource(kind="grammar", text="start: " + "(" * 9000), "cannot be followed"),
        (GrammarSource.choice([]), "1 to 1000 texts"),
        (GrammarSource.choice([""]), "not empty"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(grammars: Grammars, source: GrammarSource, told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        grammars.compile(source)
    assert "\n" not in str(refused.value)


def test_chains_of_rules_do_not_exhaust_the_stack(grammars: Grammars) -> None:
    rules = [f"r{i}: r{i + 1}" for i in range(1100)]
    text = "\n".join(["start: r0", *rules, 'r1100: "x"'])
    assert len(text) < 16_384
    grammars.compile(GrammarSource(kind="grammar", text=text)).start()


@pytest.mark.parametrize(
    ("pattern", "product"),
    [
        ("", 1),
        ("a{3}", 3),
        ("a{3,}", 3),
        ("a{3,9}b{5}", 9),
        ("((a{3})b){5}", 15),
        (r"\{9}[{9}(]{2}\(", 2),
        ("a))(b", 1),
    ],
)
def test_repetitions_multiply_within_one_another(pattern: str, product: int) -> None:
    assert nested_repeats(pattern) == product


# A real model.


def ask(model: Model, requests: list[Request], *, pages: int = 64, break_at: int | None = None) -> list[Answer]:
    """Answers to these, from one engine; a pass may break once."""

    class Breaking(LocalBackend):
        passes = 0

        async def run(self, work, steps, news):  # type: ignore[no-untyped-def]
            self.passes += 1
            if self.passes == break_at:
                raise BackendCrash("now")
            return await super().run(work, steps, news)

    async def main() -> list[Answer]:
        clock = RealClock()
        config = SchedulerConfig(joining="continuous", slots=40, pages=pages, page_tokens=16, prefill_tokens=256)
        engine = Engine(
            Scheduler(config), Breaking(model, pages=pages, page_tokens=16, clock=clock), clock, Recorder("m")
        )
        handles = [engine.submit(request, AnswerText(model.tokenizer, ())) for request in requests]
        engine.close()
        await asyncio.wait_for(engine.run(), 120)
        engine.scheduler.pool.audit()
        assert break_at is None or engine.failures == 1
        preempted.append(engine.scheduler.preemptions)
        return [handle.result() for handle in handles]

    preempted: list[int] = []
    answers = asyncio.run(main())
    assert bool(preempted[0]) == (pages < 40)
    return answers


def bound(model: Model, grammars: Grammars, number: int, schema: dict[str, Any] | None, temperature: float) -> Request:
    prompt = model.tokenizer.encode("Some JSON: " if schema else f"Once upon a time {number}")
    return Request(
        id=number,
        prompt=tuple(prompt),
        limit=80 if schema else 12,
        sampling=Sampling(temperature=temperature, seed=number),
        stop_tokens=model.tokenizer.eos_ids,
        grammar=grammars.compile(GrammarSource.json_schema(schema)) if schema else None,
        logprobs=None if schema else 1,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_schemas_are_kept_to_and_nobody_else_notices(model: Model, grammars: Grammars, temperature: float) -> None:
    """16 bound answers beside 16 free ones, whose tokens and logprobs are those they have alone."""
    jsonschema = pytest.importorskip("jsonschema_rs")
    free = [bound(model, grammars, i, None, temperature) for i in range(16)]
    held = [bound(model, grammars, 16 + i, SCHEMAS[i % 4], temperature) for i in range(16)]
    mixed = [request for pair in zip(free, held, strict=True) for request in pair]
    answers = {answer.id: answer for answer in ask(model, mixed, pages=256)}
    for i in range(16):
        answer = answers[16 + i]
        assert answer.reason == "stop", answer.text
        jsonschema.validate(SCHEMAS[i % 4], json.loads(answer.text))
    for answer in ask(model, free):
        beside = answers[answer.id]
        assert (beside.tokens, beside.logprobs) == (answer.tokens, answer.logprobs)


def test_neither_preemption_nor_a_lost_backend_changes_a_bound_answer(model: Model, grammars: Grammars) -> None:
    requests = [bound(model, grammars, i, PERSON, 1.0) for i in range(4)]
    alone = [answer.tokens for answer in ask(model, requests)]
    assert [answer.tokens for answer in ask(model, requests, break_at=9)] == alone
    assert [answer.tokens for answer in ask(model, requests, pages=6)] == alone


def test_an_answer_that_is_cut_is_a_beginning(model: Model, grammars: Grammars) -> None:
    pattern = "[0-9]{40}"
    request = Request(
        id=0,
        prompt=(504,),
        limit=6,
        grammar=grammars.compile(GrammarSource(kind="regex", text=pattern)),
    )
    [answer] = ask(model, [request])
    assert answer.reason == "length"
    assert re.fullmatch("[0-9]{1,39}", answer.text)
