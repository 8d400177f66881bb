"""Whole runs over processes: what is told, what is written, how a run goes on, what transformers makes of the model."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stretto
from stretto.core.errors import UserError
from stretto.core.plan import Context, Plan, Result
from stretto.files import load_cluster, plan_data, save_plan
from stretto.models.weights import ROPE_DIVISORS
from stretto.train import checkpoint
from stretto.train.data import Bytes, samples
from stretto.train.domain import TrainDomain
from stretto.train.job import Optimizer, Shape, TrainJob
from stretto.train.joined import join
from stretto.train.plan import TrainPlan, balanced
from stretto.train.session import model_of
from tests.train import kit

SHAPE = Shape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
CLUSTER = load_cluster(Path(__file__).parents[2] / "clusters" / "8xa100.yaml")


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    text = tmp_path / "text.txt"
    text.write_text("she sells sea shells by the sea shore; " * 60)
    return TrainJob(
        shape=SHAPE,
        data=(str(text),),
        tokenizer="bytes",
        sequence=16,
        global_batch=8,
        steps=6,
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=2, decay="cosine"),
        held_out=0.1,
        evaluate_every=3,
        checkpoint=str(tmp_path / "checkpoints"),
    )


def plan_of(job: TrainJob, **choices: Any) -> Plan[TrainJob, TrainPlan]:
    found = kit.plan_of(kit.job_of(), layers=(1,) * choices.get("pp", 1) * choices.get("chunks", 1), **choices)
    assert job.shape is not None
    layers = balanced(job.shape.spec(vocab=256, positions=16), len(found.layers))
    devices = tuple(f"node0/gpu{rank}" for rank in range(found.grid.world))
    return Plan(kind="train", job=job, choices=replace(found, layers=layers, devices=devices), cluster=CLUSTER)


def run(job: TrainJob, ctx: Context | None = None, **choices: Any) -> Result:
    return TrainDomain().run(plan_of(job, **choices), ctx or Context())


def losses(result: Result) -> list[float]:
    return [row["loss"] for row in result.outputs]


def test_a_run_and_its_report(job: TrainJob, tmp_path: Path) -> None:
    heard: list[str] = []
    ctx = Context(output=tmp_path / "report", progress=lambda what, done, total: heard.append(f"{what} {done}/{total}"))
    result = stretto.run(plan_of(job, pp=2, micro_batch=2), ctx=ctx)
    found = losses(result)
    assert len(found) == 6
    assert found[-1] < found[0] - 0.5
    assert [row["step"] for row in result.outputs] == list(range(6))
    assert [row["held_out_loss"] is not None for row in result.outputs] == [False, False, True, False, False, True]
    assert not result.interrupted
    assert heard[-1].startswith("training: loss ")
    assert heard[-1].endswith(" predicted) 6/6")
    for trace in (result.predicted, result.measured):
        assert {span.key.phase for span in trace} >= {"forward", "backward", "sum gradients", "optimizer"}
        assert trace.overlaps() == []
    passes = 6 * 2 * 2 * 4  # steps, directions, stages, micro-batches
    assert sum(span.key.phase in ("forward", "backward") for span in result.measured) == passes
    for kind in ("html", "curves", "png", "checkpoint"):
        assert Path(result.files[kind]).exists(), kind
    assert (
        "training loss" in Path(result.files["html"]).read_text() or Path(result.files["curves"]).stat().st_size > 5000
    )
    assert any("were predicted" in remark for remark in result.remarks)
    assert any(text.startswith("held-out text: loss") for _, text in result.said)


def test_a_run_goes_on_bit_by_bit(job: TrainJob, tmp_path: Path) -> None:
    whole = losses(run(replace(job, checkpoint=str(tmp_path / "whole")), dp=2, micro_batch=2))
    first = run(replace(job, steps=4, optimizer=replace(job.optimizer, decay="constant")), dp=2, micro_batch=2)
    assert len(first.outputs) == 4
    steady = replace(job, optimizer=replace(job.optimizer, decay="constant"))
    rest = run(steady, dp=2, micro_batch=2)
    assert [row["step"] for row in rest.outputs] == [4, 5]
    assert "went on from step 4" in rest.remarks
    once = losses(run(replace(steady, checkpoint=str(tmp_path / "steady")), dp=2, micro_batch=2))
    assert losses(first) + losses(rest) == once
    assert whole[:2] == once[:2]
    again = run(steady, dp=2, micro_batch=2)
    assert again.remarks == ("there was nothing left to do: the newest checkpoint has all steps",)


def test_another_text_is_not_gone_on_with(job: TrainJob, tmp_path: Path) -> None:
    run(replace(job, steps=3), micro_batch=8)
    text = Path(job.data[0])
    whole = text.read_text()
    text.write_text(whole.replace("sea shore", "sea front"))
    with pytest.raises(UserError, match=r"data: is text of digest \w+, and .*step-3 goes on from another; text of "):
        run(job, micro_batch=8)
    text.write_text(whole)
    assert [row["step"] for row in run(job, micro_batch=8).outputs] == [3, 4, 5]


def test_another_layout_goes_on_too(job: TrainJob, tmp_path: Path) -> None:
    job = replace(job, dtype="fp64", optimizer=replace(job.optimizer, decay="constant"))
    run(replace(job, steps=3), pp=2, micro_batch=2)
    rest = losses(run(job, tp=2, micro_batch=4))
    whole = losses(run(replace(job, checkpoint=str(tmp_path / "whole")), micro_batch=8))
    assert rest == pytest.approx(whole[3:], rel=1e-10)


def test_ctrl_c_ends_between_steps_with_a_checkpoint(job: TrainJob) -> None:
    long, done = replace(job, steps=100_000), []
    ctx = Context(progress=lambda what, at, of: done.append(at), cancelled=lambda: bool(done) and done[-1] >= 5)
    result = run(long, ctx, dp=2, micro_batch=2)
    assert result.interrupted
    assert 5 <= len(result.outputs) < 1000
    assert Path(result.files["checkpoint"]).name == f"step-{len(result.outputs)}"


def test_a_limit_of_seconds(job: TrainJob) -> None:
    result = run(replace(job, steps=100_000, limits=replace(job.limits, seconds=0.3)), micro_batch=8)
    assert result.interrupted
    assert result.outputs


@pytest.mark.parametrize("experts", [0, 4])
def test_transformers_loads_what_was_exported(job: TrainJob, tmp_path: Path, experts: int) -> None:
    from transformers import AutoModelForCausalLM

    shape = replace(SHAPE, experts=experts, top_k=2 if experts else 0)
    job = replace(job, shape=shape, export=str(tmp_path / "model"))
    result = run(job, tp=2, micro_batch=4)
    assert result.files["model"] == job.export
    theirs = AutoModelForCausalLM.from_pretrained(job.export, dtype=torch.float32)
    _, held_out = samples(job.data, Bytes(), length=job.sequence, held_out=job.held_out, seed=job.seed)
    tokens, targets = (torch.from_numpy(part) for part in held_out.at(range(len(held_out))))
    with torch.no_grad():
        logits = theirs(tokens).logits.double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(loss) == pytest.approx(result.outputs[-1]["held_out_loss"], rel=2e-5)
    with pytest.raises(UserError, match="exists already"):
        run(job, micro_batch=8)


def test_an_export_to_a_full_disk_leaves_nothing_and_may_be_done_again(job: TrainJob, tmp_path: Path) -> None:
    run(job, micro_batch=8)
    wanted, most = replace(job, export=str(tmp_path / "model")), resource.getrlimit(resource.RLIMIT_FSIZE)
    there = sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most[1]))
    try:
        with pytest.raises(
            UserError, match=r"model: export: cannot be written: .*run the job again: .*step-6 is whole"
        ):
            run(wanted, micro_batch=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert sorted(tmp_path.iterdir()) == there
    assert run(wanted, micro_batch=8).files["model"] == wanted.export


def test_a_missing_text_starts_nothing(job: TrainJob) -> None:
    with pytest.raises(UserError, match=r"data\.0: there is no file"):
        run(replace(job, data=("nowhere.txt",)), micro_batch=8)
    assert job.checkpoint is not None
    assert not Path(job.checkpoint).exists()


def test_mixed_precision_trains_as_fp32_does(job: TrainJob, tmp_path: Path) -> None:
    full = losses(run(job, micro_batch=4))
    half = losses(run(replace(job, dtype="bf16", checkpoint=str(tmp_path / "half")), micro_batch=4))
    assert half == pytest.approx(full, rel=0.03)
    assert half != full
    newest = checkpoint.newest(tmp_path / "half")
    assert newest is not None
    reader = checkpoint.Reader(newest)
    assert {reader.whole(name).dtype for name in reader.names()} == {torch.float32}


def test_the_same_under_torchrun(job: TrainJob, tmp_path: Path) -> None:
    expected = losses(run(job, pp=2, micro_batch=2))
    under = replace(job, checkpoint=str(tmp_path / "under"))
    save_plan(plan_of(under, pp=2, micro_batch=2), tmp_path / "plan.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "stretto", "rank"]
    done = subprocess.run(
        [*command, str(tmp_path / "plan.yaml"), "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == expected
    assert checkpoint.newest(tmp_path / "under") is not None


def test_rank_says_what_it_needs(job: TrainJob, tmp_path: Path) -> None:
    save_plan(plan_of(job, pp=2), tmp_path / "plan.yaml")
    command = [sys.executable, "-m", "stretto", "rank", str(tmp_path / "plan.yaml")]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert alone.returncode == 2
    assert "torchrun" in alone.stderr
    assert alone.stderr.count("\n") == 1
    assert plan_data(stretto.load(tmp_path / "plan.yaml"))["kind"] == "train"


def test_a_run_that_diverges_ends_with_its_weights_as_they_were(job: TrainJob) -> None:
    wild = replace(job, optimizer=Optimizer(name="sgd", learning_rate=99.0, clip_norm=None), steps=50, save_every=1)
    with pytest.raises(UserError, match=r"the gradient of step .* training has diverged; a smaller one, or a smaller"):
        run(wild, micro_batch=8)
    assert wild.checkpoint is not None
    newest = checkpoint.newest(Path(wild.checkpoint))
    assert newest is not None
    reader = checkpoint.Reader(newest)
    assert all(bool(reader.whole(name).isfinite().all()) for name in reader.names())


def test_a_job_that_is_done_writes_nothing_again(job: TrainJob) -> None:
    first = run(job, micro_batch=8)
    index = Path(first.files["checkpoint"]) / "index.json"
    written = index.stat().st_mtime_ns
    assert run(job, micro_batch=8).outputs == ()
    assert index.stat().st_mtime_ns == written


def test_evaluations_come_once_each_and_bytes_are_counted_after_going_on_too(job: TrainJob) -> None:
    half = run(replace(job, steps=3), micro_batch=8)
    rest = run(job, micro_batch=8)
    found = [[step for step, _ in each.measured.attributes["curves"]["held-out loss"]] for each in (half, rest)]
    assert found == [[0, 3], [3, 6]]
    before, after = (float(each.measured.attributes["peak_bytes"]["0"]) for each in (half, rest))
    assert after == pytest.approx(before, rel=0.02)


def test_a_seed_of_the_command_line_is_added(job: TrainJob, tmp_path: Path) -> None:
    added = losses(run(job, Context(seed=3), micro_batch=8))
    own = losses(run(replace(job, seed=job.seed + 3, checkpoint=str(tmp_path / "own")), micro_batch=8))
    assert added == own != losses(run(replace(job, checkpoint=str(tmp_path / "plain")), micro_batch=8))


def test_a_checkpoint_that_cannot_be_written_starts_nothing(job: TrainJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint: cannot be written"):
        run(replace(job, checkpoint=str(tmp_path / "file")), micro_batch=8)


def test_what_config_json_cannot_say_is_not_exported(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Divided(dict[str, None]):
        file = "model.gguf"

    own: Any = replace(model_of(job), weights=Divided({ROPE_DIVISORS: None}))  # type: ignore[arg-type]
    monkeypatch.setattr("stretto.train.export.model_of", lambda job: own)
    with pytest.raises(UserError, match=r"model\.gguf: export: has rotary divisors"):
        run(replace(job, export=str(tmp_path / "model")), micro_batch=8)


def test_a_plan_that_does_not_go_with_its_job_joins_nothing(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    plan = plan_of(job, micro_batch=8)
    with pytest.raises(UserError, match="choices: the plan cannot run: the stages have 1 layers, the model 2"):
        join(replace(plan, choices=replace(plan.choices, layers=(1,))), lambda message: None)
