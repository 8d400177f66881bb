"""Models in worker processes: whole and split, with good and bad workers; and the frames they speak."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from stretto.core.clock import RealClock
from stretto.core.errors import UserError
from stretto.core.faults import BackendCrash
from stretto.core.record import Recorder
from stretto.models import load_model
from stretto.serve import remote, wire
from stretto.serve.backend import Backend, Pass, PassResult, Row
from stretto.serve.engine import Engine
from stretto.serve.local import LocalBackend
from stretto.serve.logprobs import Logprob
from stretto.serve.remote import MOST_CRASHES, RemoteBackend
from stretto.serve.request import Request
from stretto.serve.sampling import Sampling
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.worker import SlotMap
from tests.models.conftest import make_reference
from tests.serve.worlds import config

torch = pytest.importorskip("torch")

T = TypeVar("T")
PAGES, PAGE_TOKENS = 12, 16
CPU = min(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with biases, in Hugging Face's layout."""
    import tokenizers

    folder = tmp_path_factory.mktemp("model")
    make_reference("qwen2").save_pretrained(folder)
    letters = {chr(65 + i): i for i in range(26)}
    tokenizers.Tokenizer(tokenizers.models.BPE(letters, [])).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings() -> SchedulerConfig:
    return config(slots=3, pages=PAGES, page_tokens=PAGE_TOKENS, prefill_tokens=8)


def requests() -> list[Request]:
    """More than there are slots, of mixed lengths; the last is drawn, not greedy."""
    prompts = [tuple((7 * i + k) % 95 for k in range(length)) for i, length in enumerate((5, 19, 3, 11))]
    how = [Sampling()] * 3 + [Sampling(temperature=1.0, top_k=20, seed=4)]
    return [Request(id=i, prompt=p, limit=8 + i, sampling=s) for i, (p, s) in enumerate(zip(prompts, how, strict=True))]


async def answers(engine: Engine) -> list[tuple[int, ...]]:
    handles = [engine.submit(request) for request in requests()]
    engine.close()
    await engine.run()
    return [handle.result().tokens for handle in handles]


def engine_on(backend: Backend, clock: RealClock) -> Engine:
    return Engine(Scheduler(settings()), backend, clock, Recorder("measured"))


@pytest.fixture(scope="session")
def expected(folder: str) -> list[tuple[int, ...]]:
    """The tokens that one process gives."""
    clock = RealClock()
    model = load_model(folder, threads=1)
    backend = LocalBackend(model, pages=PAGES, page_tokens=PAGE_TOKENS, clock=clock)
    return asyncio.run(answers(engine_on(backend, clock)))


async def start(folder: str, clock: RealClock, ranks: int = 1, **options: Any) -> RemoteBackend:
    size = {"pages": PAGES, "page_tokens": PAGE_TOKENS}
    return await RemoteBackend.start(folder, threads=1, clock=clock, ranks=ranks, **{**size, **options})


def with_backend(folder: str, ranks: int, use: Callable[[RemoteBackend, RealClock], Awaitable[T]], **options: Any) -> T:
    """`use` workers, then close them and see that they are gone."""

    async def main() -> T:
        clock = RealClock()
        backend = await start(folder, clock, ranks, cpus=[[CPU]] * ranks, **options)
        pids = backend.pids
        assert all(os.sched_getaffinity(int(task.name)) == {CPU} for p in pids for task in tasks(p))
        try:
            return await use(backend, clock)
        finally:
            pids += backend.pids
            await backend.close()
            assert not [pid for pid in pids if alive(pid)]

    return asyncio.run(main())


def tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def row(tokens: Sequence[int] = (1, 2, 3), start: int = 0, table: Sequence[int] = (0,), request: int = 0) -> Row:
    position = start + len(tokens)
    how = Sampling()
    return Row(id=request, tokens=tuple(tokens), start=start, table=tuple(table), sampling=how, position=position)


class Tapped:
    """A backend that notes the digests of all ranks, and does something before a chosen pass."""

    steps_at_once = 1

    def __init__(self, inner: RemoteBackend, before: dict[int, Callable[[], None]] | None = None) -> None:
        self.inner = inner
        self.digests: list[set[str]] = []
        self.counts: list[int] = []
        self.spans: list[tuple[float, float]] = []
        self._before = before or {}
        self._judge = inner._result
        inner._result = self._note  # type: ignore[method-assign]
        self.wipe, self.forget = inner.wipe, inner.forget

    def _note(self, found: Sequence[wire.Frame]) -> PassResult:
        self.digests.append({answer["slots"] for answer in found})
        self.counts.append(len(found))
        result = self._judge(found)
        self.spans += result.spans_s
        return result

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        self._before.pop(len(self.digests), lambda: None)()
        return await self.inner.run(work, steps, news)


# Good days.


def test_two_ranks_serve_the_tokens_of_one_and_agree_at_every_step(
    folder: str, expected: list[tuple[int, ...]]
) -> None:
    async def use(backend: RemoteBackend, clock: RealClock) -> tuple[list[tuple[int, ...]], Tapped, float]:
        tapped = Tapped(backend)
        clock.restart()
        return await answers(engine_on(tapped, clock)), tapped, clock.now

    found, tapped, finished = with_backend(folder, 2, use)
    assert found == expected
    assert set(tapped.counts) == {2}
    assert all(len(digests) == 1 for digests in tapped.digests)
    assert len({min(digests) for digests in tapped.digests}) == len(tapped.digests)
    instants = [instant for span in tapped.spans for instant in span]
    assert instants == sorted(instants)
    assert instants[0] >= 0
    assert instants[-1] <= finished


def test_moves_and_ranges_reach_the_worker(folder: str) -> None:
    """A sequence that continues in another slot after a move goes on as it would have in place."""

    async def use(backend: RemoteBackend, clock: RealClock) -> list[int]:
        async def token(work: Pass) -> int:
            return (await backend.run(work, 1, asyncio.Event())).tokens[0][0]

        first = await token(Pass(step=0, prefill=(row((5, 6, 7)),), decode=()))
        stayed = await token(Pass(step=1, prefill=(), decode=(row((first,), 3),)))
        moved = await token(
            Pass(step=2, prefill=(), decode=(row((first,), 3, (4,)),), moves=((0, 4, 3),), slots=(2, 5))
        )
        asking = replace(row((first,), 3), logprobs=2, mask=b"\x60")
        asked = await backend.run(Pass(step=3, prefill=(), decode=(asking,)), 1, asyncio.Event())
        assert asked.tokens[0][0] in (5, 6)
        assert asked.logprobs[0][0].token == asked.tokens[0][0]
        assert asked.logprobs[0][0].top[0][0] == stayed
        return [stayed, moved]

    stayed, moved = with_backend(folder, 1, use)
    assert stayed == moved


def test_pages_go_to_spare_memory_and_back_on_every_rank(folder: str, expected: list[tuple[int, ...]]) -> None:
    tight = replace(settings(), pages=9, page_tokens=4, preemption="swap", spare_pages=8)

    async def use(backend: RemoteBackend, clock: RealClock) -> None:
        tapped, scheduler = Tapped(backend), Scheduler(tight)
        assert await answers(Engine(scheduler, tapped, clock, Recorder("measured"))) == expected
        assert scheduler.swaps > 0
        assert all(len(digests) == 1 for digests in tapped.digests)

    with_backend(folder, 2, use, pages=9, page_tokens=4, spare_pages=8)


# Bad days.


def test_a_killed_rank_costs_no_token(folder: str, expected: list[tuple[int, ...]]) -> None:
    async def use(backend: RemoteBackend, clock: RealClock) -> None:
        first = backend.pids
        tapped = Tapped(backend, {6: lambda: os.kill(first[1], signal.SIGKILL)})
        engine = engine_on(tapped, clock)
        assert await answers(engine) == expected
        assert engine.failures == 1
        assert len(set(first) | set(backend.pids)) == 4
        assert not [pid for pid in first if alive(pid)]

    with_backend(folder, 2, use)


def test_ranks_that_disagree_are_a_crash(folder: str) -> None:
    """Rank 1 is told another page: it computes the same, but its map differs."""

    async def use(backend: RemoteBackend, clock: RealClock) -> None:
        pids = backend.pids
        other = backend._ranks[1]
        right = other.ask
        wrong = wire.pack({"run": wire.pass_to_json(Pass(step=0, prefill=(row(table=(1,)),), decode=()))})
        other.ask = lambda question, timeout_s: right(wrong, timeout_s)  # type: ignore[method-assign]
        with pytest.raises(BackendCrash, match="the ranks disagree about the KV pages"):
            await backend.run(Pass(step=0, prefill=(row(),), decode=()), 1, asyncio.Event())
        assert backend.pids == ()
        await backend.close()
        assert not [pid for pid in pids if alive(pid)]

    with_backend(folder, 2, use)


def test_a_cancelled_pass_ends_its_workers_and_the_next_has_fresh_ones(folder: str) -> None:
    async def use(backend: RemoteBackend, clock: RealClock) -> None:
        pids = backend.pids
        work = Pass(step=0, prefill=(row(),), decode=())
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await backend.run(work, 1, asyncio.Event())
        assert (await backend.run(work, 1, asyncio.Event())).tokens[0]
        assert backend.pids[0] not in pids

    with_backend(folder, 1, use)


def test_closing_ends_a_worker_that_does_not_listen(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(backend: RemoteBackend, clock: RealClock) -> None:
        os.kill(backend.pids[0], signal.SIGSTOP)
        monkeypatch.setattr(remote, "CLOSE_TIMEOUT_S", 0.5)

    with_backend(folder, 1, use)


def test_an_unknown_model_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="no-such-model") as caught:
        asyncio.run(start("./no-such-model", RealClock(), 2))
    assert "\n" not in str(caught.value)


def program(tmp_path: Path, body: str) -> str:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\n{body}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo first >&2; echo out of memory >&2; exit 3", "rank 0 died: out of memory"),
        ("exit 3", "rank 0 died: status 3"),
        ("exec sleep 60", "rank 0 did not answer in 0.5 s"),
        ("echo this is no frame; exec sleep 60", "rank 0 did not answer in frames: frame is "),
        ("printf '\\000\\000\\000\\002[]'; exec sleep 60", "a frame must hold a JSON object"),
    ],
)
def test_a_worker_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path, body))
    with pytest.raises(UserError) as caught:
        asyncio.run(start("default", RealClock(), start_timeout_s=0.5))
    assert message in str(caught.value)
    assert not [pid for pid in (tmp_path / "pids").read_text().split() if alive(int(pid))]


def test_fresh_workers_are_tried_a_few_times_only(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(backend: RemoteBackend, clock: RealClock) -> None:
        os.kill(backend.pids[0], signal.SIGKILL)
        monkeypatch.setattr(sys, "executable", program(tmp_path, "exit 3"))
        messages = []
        for _ in range(MOST_CRASHES + 2):
            with pytest.raises(BackendCrash) as caught:
                await backend.run(Pass(step=0, prefill=(row(),), decode=()), 1, asyncio.Event())
            messages.append(str(caught.value))
        assert messages[0] == "rank 0 died: status -9"
        assert "4 times in a row" in messages[-1]
        assert len((tmp_path / "pids").read_text().split()) == MOST_CRASHES - 1

    with_backend(folder, 1, use)


def test_numbers_out_of_range_are_refused() -> None:
    for options, field in (({"ranks": 0}, "ranks"), ({"cpus": [[0], [0]]}, "cpus"), ({"cpus": [[10**6]]}, "cpus")):
        with pytest.raises(ValueError, match=field):
            asyncio.run(start("default", RealClock(), **options))


def test_a_worker_ends_with_its_input_even_while_it_waits_for_another_rank(folder: str, tmp_path: Path) -> None:
    set_up = wire.SetUp(
        model=folder,
        dtype="fp32",
        threads=1,
        pages=2,
        page_tokens=8,
        rank=0,
        world=2,
        rendezvous=str(tmp_path / "rendezvous"),
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-m", "stretto.serve.worker"], stdin=pipe, stdout=pipe) as worker:
        try:
            assert worker.stdin is not None
            worker.stdin.write(wire.pack({"set_up": set_up.to_json()}))
            worker.stdin.flush()
            for _ in range(200):
                with pytest.raises(subprocess.TimeoutExpired):
                    worker.wait(0.1)
                if (tmp_path / "rendezvous").exists():
                    break
            out, _ = worker.communicate(timeout=10)
            assert (worker.returncode, out) == (0, b"")
        finally:
            worker.kill()


def test_what_is_printed_does_not_mix_with_answers() -> None:
    script = (
        "import os; from stretto.serve.worker import _take_stdout; answers = _take_stdout(); "
        "print('noise', flush=True); os.system('echo noise'); answers.write(b'answer'); answers.flush()"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30, check=True)
    assert found.stdout == b"answer"
    assert found.stderr.split() == [b"noise", b"noise"]


# Frames and maps.


def test_a_pass_survives_the_wire() -> None:
    drawn = Row(
        id=3, tokens=(9,), start=7, table=(2, 5), sampling=Sampling(temperature=0.5, top_k=3, seed=8), position=8
    )
    bound = replace(drawn, logprobs=3, mask=b"\x00\xff\x05")
    chunk = Row(id=4, tokens=(1, 2), start=0, table=(1,), sampling=None, position=2)
    for work in (
        Pass(step=5, prefill=(chunk,), decode=(drawn,), moves=((6, 2, 7), (1, 0, 3)), slots=(0, 4)),
        Pass(step=6, prefill=(chunk,), decode=(), swap_out=((3, 0, 16), (4, 1, 2)), swap_in=((2, 5, 9),)),
        Pass(step=0, prefill=(), decode=(drawn, bound)),
    ):
        frame = wire.read(io.BytesIO(wire.pack(wire.pass_to_json(work))))
        assert frame is not None
        assert wire.pass_from_json(frame) == work


def test_answers_survive_the_wire_and_others_are_refused() -> None:
    told = (Logprob(token=7, logprob=-0.1, top=((7, -0.1), (2, -2.7))),)
    ran = wire.Ran(tokens={3: (1, 2), 11: (7,)}, span=(0.5, 0.75), slots="ab", logprobs={11: told})
    frame = wire.read(io.BytesIO(wire.pack(ran.to_json())))
    assert frame is not None
    assert wire.Ran.from_json(frame) == ran
    few = {**frame, "logprobs": [[3, [[1, -0.5, []]]]]}
    for bad in ({}, {**frame, "span": [1.0]}, {**frame, "tokens": [[1, 2]]}, {**frame, "tokens": 5}, few):
        with pytest.raises(ValueError, match="no answer to a pass"):
            wire.Ran.from_json(bad)


def test_frames_that_are_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = wire.pack({"text": "x" * 100})
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ValueError, match="frame is 111"):
        wire.pack({"text": "x" * 100})
    with pytest.raises(ValueError, match="frame is 111"):
        wire.read(io.BytesIO(packed))
    assert wire.read(io.BytesIO(b"")) is None


def test_the_slot_map_follows_writes_and_moves() -> None:
    def digest(*passes: Pass) -> str:
        slots = SlotMap(pages=4, page_tokens=4)
        for work in passes:
            slots.note(work)
        return slots.digest

    prompt = Pass(step=0, prefill=(row(range(6), 0, (2, 0)),), decode=())
    step = Pass(step=1, prefill=(), decode=(row((9,), 6, (2, 0)),))
    in_one = Pass(step=0, prefill=(row(range(7), 0, (2, 0)),), decode=())
    elsewhere = Pass(step=0, prefill=(row(range(7), 0, (2, 1)),), decode=())
    someone = Pass(step=0, prefill=(row(range(7), 0, (2, 0), 5),), decode=())
    assert digest(prompt, step) == digest(in_one)
    assert len({digest(), digest(prompt), digest(in_one), digest(elsewhere), digest(someone)}) == 5

    moved = Pass(step=1, prefill=(), decode=(), moves=((0, 3, 3),))
    written = Pass(step=1, prefill=(row(range(3), 0, (3,)),), decode=())
    shorter = Pass(step=1, prefill=(), decode=(), moves=((0, 3, 2),))
    assert digest(in_one, moved) == digest(in_one, written)
    assert digest(in_one, moved) != digest(in_one, shorter)
    assert digest(in_one, moved) != digest(in_one)
