"""`stretto.LLM`: the engine without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import stretto
from stretto.core.errors import FieldError, UserError
from stretto.serve.engine import Engine
from stretto.serve.handle import Handle, TextStream
from stretto.serve.request import Request
from stretto.serve.sampling import Sampling
from stretto.serve.settings import EngineSettings

from .conftest import Running


@pytest.fixture(scope="module")
def llm(chat_folder: Path) -> stretto.LLM:
    return stretto.LLM(str(chat_folder), dtype="fp32", threads=1, slots=3)


def test_answers_come_in_the_order_of_the_prompts(llm: stretto.LLM) -> None:
    prompts = ["ab", "cdefg", "h", "ij", "klm"]
    together = llm.generate(prompts, max_tokens=9, ignore_eos=True)
    assert [answer.prompt for answer in together] == prompts
    assert [answer.prompt_tokens for answer in together] == [2, 5, 1, 2, 3]
    assert all(len(answer.tokens) == 9 and answer.reason == "length" for answer in together)
    assert all(answer.first_token_s is not None and 0 < answer.first_token_s <= answer.seconds for answer in together)
    for prompt, answer in zip(prompts, together, strict=True):
        assert llm.generate(prompt, max_tokens=9, ignore_eos=True)[0].text == answer.text


def test_prompt_i_uses_seed_plus_i(llm: stretto.LLM) -> None:
    both = llm.generate(["ab", "ab"], Sampling(temperature=2.0, seed=5), max_tokens=9, ignore_eos=True)
    alone = llm.generate("ab", Sampling(temperature=2.0, seed=6), max_tokens=9, ignore_eos=True)
    assert both[1].tokens == alone[0].tokens != both[0].tokens


def test_it_answers_as_the_server_does(llm: stretto.LLM, server: Running) -> None:
    how = {"temperature": 2.0, "seed": 5, "top_p": 0.9, "top_k": 40}
    with server.client() as client:
        served = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 20, **how}).json()["choices"][0]
        said = [{"role": "user", "content": "ab"}]
        chatted = client.post("/v1/chat/completions", json={"messages": said, "max_tokens": 20, **how}).json()
    assert llm.generate("ab", Sampling(**how), max_tokens=20)[0].text == served["text"]
    [answer] = llm.chat(said, Sampling(**how), max_tokens=20)
    assert answer.text == chatted["choices"][0]["message"]["content"]
    assert answer.prompt == "user:ab;>"
    assert llm.chat([said, said], Sampling(**how), max_tokens=20)[0].text == answer.text


def test_a_stop_string_ends_an_answer(llm: stretto.LLM) -> None:
    free = llm.generate("ab", max_tokens=20, ignore_eos=True)[0].text
    cut = llm.generate("ab", max_tokens=20, stop=[free[3:5]], ignore_eos=True)[0]
    assert cut.text == free[: free.index(free[3:5])]
    assert cut.reason == "stop"


def test_it_works_inside_a_running_loop(llm: stretto.LLM) -> None:
    async def notebook() -> str:
        return llm.generate("ab", max_tokens=3)[0].text

    assert asyncio.run(notebook()) == llm.generate("ab", max_tokens=3)[0].text


def test_no_prompts_no_answers(llm: stretto.LLM) -> None:
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_mistakes_are_told(llm: stretto.LLM, chat_folder: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.1.*no tokens"):
        llm.generate(["ab", ""])
    with pytest.raises(UserError, match=r"250 tokens and 7 new ones exceed max_model_len, 256"):
        llm.generate("a" * 250, max_tokens=7)
    vocabulary = llm.model.spec.vocab
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.model.tokenizer, "encode", lambda text: [1, vocabulary])
        with pytest.raises(
            UserError, match=rf"prompts\.0: token {vocabulary} is outside of the vocabulary of {vocabulary}"
        ):
            llm.generate("ab")
    with pytest.raises(FieldError, match="max_tokens"):
        llm.generate("ab", max_tokens=0)
    with pytest.raises(FieldError, match="stop"):
        llm.generate("ab", stop=[""])
    with pytest.raises(FieldError, match=r"pool_tokens is 90; it must be at least 100"):
        stretto.LLM(str(chat_folder), dtype="fp32", threads=1, max_model_len=100, pool_tokens=90)
    with pytest.raises(FieldError, match="at most 256"):
        stretto.LLM(str(chat_folder), dtype="fp32", threads=1, max_model_len=257)


def test_the_pool_holds_the_longest_request_in_every_slot(chat_folder: Path) -> None:
    small = stretto.LLM(str(chat_folder), dtype="fp32", threads=1, slots=3, max_model_len=100)
    config = small.settings.scheduler(small.model.spec)
    assert config.pages * config.page_tokens >= 3 * 100
    fused = EngineSettings(slots=3, max_model_len=100, layout="slots").scheduler(small.model.spec)
    assert (fused.pages, fused.page_tokens) == (3, 100)
    answers = small.generate(["a" * 10] * 5, max_tokens=90, ignore_eos=True)
    assert {len(answer.tokens) for answer in answers} == {90}


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_smaller_pool_puts_requests_back_and_changes_no_answer(chat_folder: Path, preemption: str) -> None:
    size = {"slots": 4, "max_model_len": 100, "pool_tokens": 192, "spare_tokens": 200}
    small = stretto.LLM(str(chat_folder), dtype="fp32", threads=1, preemption=preemption, **size)
    roomy = stretto.LLM(str(chat_folder), dtype="fp32", threads=1, slots=4, max_model_len=100)
    schedulers = []
    submit = Engine.submit

    def noting(self: Engine, request: Request, stream: TextStream | None = None) -> Handle:
        schedulers.append(self.scheduler)
        return submit(self, request, stream)

    asked = {"max_tokens": 85, "ignore_eos": True, "sampling": Sampling(temperature=2.0, seed=1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "submit", noting)
        answers = small.generate(["abcdefg", "hij", "klm", "no"], **asked)  # type: ignore[arg-type]
    expected = roomy.generate(["abcdefg", "hij", "klm", "no"], **asked)  # type: ignore[arg-type]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert schedulers[0].preemptions > 0
    assert (schedulers[0].swaps > 0) == (preemption == "swap")


def test_what_exceeds_the_memory_is_refused(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 500_900_000}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    with pytest.raises(UserError, match=r"^slots: weights and 4000 slots of 256 positions.*\d+ slots would fit"):
        stretto.LLM(str(chat_folder), dtype="fp32", threads=1, slots=4000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"slots": 0},
        {"threads": 0},
        {"max_model_len": 1},
        {"prefill_tokens": 0},
        {"joining": "static"},
        {"joining": "other"},
        {"preemption": "none"},
        {"pool_tokens": 0},
        {"pool_tokens": 5000, "layout": "slots"},
        {"spare_tokens": -1},
    ],
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(FieldError, match=next(iter(wrong))):
        EngineSettings(**wrong)  # type: ignore[arg-type]
