"""One text a prompt from the fused decoder: whatever the batch, order, slot, page size, chunks, or preemption."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from stretto.core.clock import RealClock  # noqa: E402
from stretto.core.record import Recorder  # noqa: E402
from stretto.models.load import Model, load_model  # noqa: E402
from stretto.serve.backend import Backend  # noqa: E402
from stretto.serve.engine import Engine  # noqa: E402
from stretto.serve.lane_engine import engine_of  # noqa: E402
from stretto.serve.local import LocalBackend  # noqa: E402
from stretto.serve.local_lanes import LaneBackend  # noqa: E402
from stretto.serve.logprobs import Logprob  # noqa: E402
from stretto.serve.request import Request  # noqa: E402
from stretto.serve.sampling import Sampling  # noqa: E402
from stretto.serve.scheduler import Scheduler  # noqa: E402
from stretto.serve.scheduler_config import SchedulerConfig  # noqa: E402

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "2 + 2 =",
    "The history of the printing press begins long before its famous inventor set his first line of type. Paper had",
    "Water boils at",
    "A list of colours: red,",
]
NEW = 16
Said = tuple[tuple[int, ...], tuple[Logprob, ...] | None]
"""The tokens of an answer and, of every other one, their logprobs."""


@pytest.fixture(scope="module", params=["exact", "bf16", "fast"])
def model(packaged: Path, request: pytest.FixtureRequest) -> Model:
    return load_model(
        str(packaged), dtype="fp32" if request.param == "exact" else "bf16", path=request.param, threads=2
    )


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def texts(
    model: Model, order: list[int], settings: SchedulerConfig, *, drawn: bool = False, copies: int = 1, long: int = 1
) -> tuple[list[Said], Scheduler]:
    """What each prompt's answer says, submitted in this order, so many times over; and the scheduler at the end.

    Prompts are repeated `long` times, and answers are as much longer.
    """

    async def main() -> tuple[list[Said], Scheduler]:
        clock = RealClock()
        size = {"pages": settings.pages, "page_tokens": settings.page_tokens, "spare_pages": settings.spare_pages}
        if settings.prefill == "lanes":
            sides = LaneBackend(model, clock=clock, pages=settings.pages, page_tokens=settings.page_tokens, threads=1)
            backend: Backend = sides
        else:
            backend = LocalBackend(model, clock=clock, **size)
        engine = engine_of(settings, backend, clock, Recorder("measured"))
        handles = {}
        for copy in range(copies):
            for i in order:
                sampling = Sampling(temperature=0.9, top_k=40, seed=i) if drawn else Sampling()
                prompt = tuple(model.tokenizer.encode(PROMPTS[i]) * long)
                number = copy * len(PROMPTS) + i
                told = 2 if i % 2 else None
                request = Request(id=number, prompt=prompt, limit=NEW * long, sampling=sampling, logprobs=told)
                handles[number] = engine.submit(request)
        engine.close()
        await asyncio.wait_for(engine.run(), 60)
        cached = sum(handle.cached_tokens for handle in handles.values())
        assert (cached > 0) == settings.prefix_cache
        found = [handles[i].result() for i in sorted(handles)]
        if settings.prefill == "lanes":
            sides.close()
        return [(answer.tokens, answer.logprobs) for answer in found], engine.scheduler

    return asyncio.run(main())


def config(
    slots: int, prefill_tokens: int, page_tokens: int = 64, pages: int | None = None, **more: object
) -> SchedulerConfig:
    return SchedulerConfig(
        joining="continuous",
        slots=slots,
        pages=pages or slots * -(-64 // page_tokens),
        page_tokens=page_tokens,
        prefill_tokens=prefill_tokens,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("drawn", [False, True])
def test_one_text_a_prompt(model: Model, drawn: bool) -> None:
    forwards, backwards = list(range(6)), list(range(5, -1, -1))
    alone, _ = texts(model, forwards, config(1, 512), drawn=drawn)
    preempted = swaps = 0
    for order, settings in (
        (forwards, config(6, 512)),
        (backwards, config(6, 7)),
        (backwards, config(3, 16, page_tokens=5)),
        (backwards, config(5, 3, page_tokens=8, pages=12)),
        (forwards, config(4, 512, page_tokens=8, pages=14, preemption="swap", spare_pages=14)),
        (backwards, config(4, 16, layout="slots")),
        (forwards, config(6, 64, layout="slots", reorder="never")),
    ):
        found, scheduler = texts(model, order, settings, drawn=drawn)
        assert found == alone, settings
        preempted += scheduler.preemptions
        swaps += scheduler.swaps
    assert preempted > swaps > 0


@pytest.mark.parametrize("drawn", [False, True])
def test_pages_found_again_change_no_token(model: Model, drawn: bool) -> None:
    order = list(range(6))
    alone, _ = texts(model, order, config(1, 512), drawn=drawn)
    for settings in (
        config(6, 512, page_tokens=4, prefix_cache=True),
        config(3, 8, page_tokens=4, prefix_cache=True),
        config(4, 16, page_tokens=4, pages=30, prefix_cache=True),
    ):
        found, _ = texts(model, order, settings, drawn=drawn, copies=2)
        assert found == [*alone, *alone], settings


@pytest.mark.parametrize("drawn", [False, True])
def test_two_lanes_change_no_token(model: Model, drawn: bool) -> None:
    """Passes of prompts and of decoding rows on two teams of threads at once, over the same pages."""
    forwards, backwards = list(range(6)), list(range(5, -1, -1))
    alone, _ = texts(model, forwards, config(1, 512), drawn=drawn)
    preempted = 0
    for order, settings, copies in (
        (forwards, config(6, 512, prefill="lanes"), 1),
        (backwards, config(6, 7, prefill="lanes"), 1),
        (backwards, config(3, 16, page_tokens=5, prefill="lanes", horizon="shortage"), 1),
        (backwards, config(5, 3, page_tokens=8, pages=12, prefill="lanes"), 1),
        (forwards, config(4, 8, page_tokens=4, pages=30, prefill="lanes", prefix_cache=True), 2),
    ):
        found, scheduler = texts(model, order, settings, drawn=drawn, copies=copies)
        assert found == alone * copies, settings
        preempted += scheduler.preemptions
    assert preempted > 0


@pytest.mark.parametrize(("path", "drawn"), [("exact", False), ("fast", True)])
def test_keys_and_values_in_4_bits_change_with_nothing_but_the_text(packaged: Path, path: str, drawn: bool) -> None:
    model = load_model(str(packaged), dtype="int4", path=path, threads=2)
    order = [1, 3, 4]
    pages = {"page_tokens": 64, "pages": 24}
    alone, _ = texts(model, order, config(1, 512, **pages), drawn=drawn, long=4)  # type: ignore[arg-type]
    plain = load_model(str(packaged), dtype="fp32", path=path, threads=2)
    assert texts(plain, order, config(6, 512, **pages), drawn=drawn, long=4)[0] != alone  # type: ignore[arg-type]
    preempted = 0
    for turned, settings, copies in (
        (order, config(6, 512, **pages), 1),  # type: ignore[arg-type]
        (order[::-1], config(6, 7, **pages), 1),  # type: ignore[arg-type]
        (order, config(3, 100, page_tokens=64, pages=4), 1),
        (order[::-1], config(2, 512, prefix_cache=True, **pages), 2),  # type: ignore[arg-type]
    ):
        found, scheduler = texts(model, turned, settings, drawn=drawn, copies=copies, long=4)
        assert found == alone * copies, settings
        preempted += scheduler.preemptions
    assert preempted > 0


def said(model: Model, settings: SchedulerConfig, concurrent: int, repeats: int) -> tuple[list[tuple[int, ...]], int]:
    """The tokens of so many short answers, so many of them at a time, and how often one was put back."""

    async def main() -> tuple[list[tuple[int, ...]], int]:
        clock = RealClock()
        size = {"pages": settings.pages, "page_tokens": settings.page_tokens, "spare_pages": settings.spare_pages}
        engine = Engine(Scheduler(settings), LocalBackend(model, clock=clock, **size), clock, Recorder("measured"))
        running = asyncio.create_task(engine.run())
        room = asyncio.Semaphore(concurrent)

        async def ask(number: int) -> tuple[int, ...]:
            prompt = tuple(model.tokenizer.encode(PROMPTS[number % len(PROMPTS)]))
            async with room:
                return (await engine.submit(Request(id=number, prompt=prompt, limit=SHORT)).answer()).tokens

        found = await asyncio.gather(*(ask(number) for number in range(repeats)))
        engine.close()
        await running
        engine.scheduler.audit()
        return found, engine.scheduler.preemptions

    return asyncio.run(main())


SHORT = 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("concurrent", [1, 3, 8, 16, 32])
def test_one_text_a_prompt_fifty_times_over(packaged: Path, concurrent: int) -> None:
    """Each with and without the prefix cache, in chunks of 16, 64 and 512, with room for all and with too little."""
    model = load_model(str(packaged), dtype="fp32", path="exact", threads=2)
    one_by_one, _ = texts(model, list(range(len(PROMPTS))), config(1, 512, page_tokens=8))
    alone = [tokens[:SHORT] for tokens, _ in one_by_one]
    put_back = 0
    for prefix_cache in (False, True):
        for chunk in (16, 64, 512):
            for tight in (False, True) if concurrent > 1 else (False,):
                pages = 2 + 2 * concurrent if tight else 8 * concurrent
                swap = {"preemption": "swap", "spare_pages": concurrent} if chunk == 64 else {}
                how = config(concurrent, chunk, 8, pages, prefix_cache=prefix_cache, **swap)
                found, preemptions = said(model, how, concurrent, 50)
                put_back += preemptions
                assert found == [alone[i % len(PROMPTS)] for i in range(50)], how
    assert (put_back > 0) == (concurrent > 1)
