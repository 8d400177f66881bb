"""Whatever the layout, a step is the step of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from stretto.models.causal import CausalStage
from stretto.models.causal_weights import initialise
from stretto.models.dropout import token_keys
from stretto.train.job import Adapters, Optimizer, Shape, TrainJob
from tests.train import kit

SHAPES = {
    "dense": kit.DENSE,
    "untied": kit.untied(kit.DENSE),
    "mixed": kit.MIXED,
    "dropped": kit.DROPPED,
    "unet": kit.UNET,
    "mixed unet": kit.MIXED_UNET,
}


@lru_cache(maxsize=8)
def expected(name: str) -> tuple[TrainJob, dict[str, Any]]:
    shape: Shape = SHAPES[name]
    job = kit.job_of(shape)
    return job, kit.reference(job)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {"micro_batch": 2}),
    ("dense", {"dp": 2, "micro_batch": 2}),
    ("dropped", {"dp": 4, "micro_batch": 1, "recompute": True}),
    ("dense", {"tp": 2, "micro_batch": 4}),
    ("dropped", {"tp": 3, "micro_batch": 2, "recompute": True}),
    ("dense", {"pp": 2, "micro_batch": 2}),
    ("unet", {"pp": 2, "micro_batch": 1, "schedule": "fill-drain"}),
    ("dense", {"pp": 2, "micro_batch": 2, "schedule": "interleaved", "chunks": 2}),
    ("unet", {"pp": 2, "micro_batch": 2, "schedule": "looped", "chunks": 2, "recompute": True}),
    ("unet", {"pp": 4, "micro_batch": 1}),
    ("unet", {"pp": 2, "micro_batch": 2, "layers": (1, 4)}),
    ("dense", {"pp": 2, "tp": 2, "micro_batch": 2}),
    ("unet", {"pp": 2, "tp": 3, "micro_batch": 2, "schedule": "interleaved", "chunks": 2}),
    ("dense", {"pp": 2, "dp": 2, "micro_batch": 1}),
    ("dropped", {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 1}),
    ("dense", {"cp": 2, "micro_batch": 2}),
    ("dense", {"cp": 2, "micro_batch": 2, "cp_layout": "zigzag"}),
    ("dense", {"cp": 2, "micro_batch": 2, "attention": "rsa"}),
    ("dense", {"cp": 2, "micro_batch": 2, "attention": "all_to_all", "cp_layout": "zigzag"}),
    ("dropped", {"cp": 4, "micro_batch": 2, "cp_layout": "zigzag", "recompute": True}),
    ("dense", {"cp": 2, "dp": 2, "micro_batch": 1}),
    ("dense", {"cp": 2, "tp": 2, "micro_batch": 2}),
    ("dense", {"cp": 2, "pp": 2, "micro_batch": 2}),
    ("unet", {"cp": 2, "pp": 2, "tp": 2, "micro_batch": 2, "cp_layout": "zigzag"}),
    ("untied", {"pp": 2, "micro_batch": 2}),
    ("untied", {"pp": 2, "tp": 2, "dp": 2, "micro_batch": 2}),
    ("untied", {"tp": 2, "cp": 2, "micro_batch": 4}),
    ("mixed", {"micro_batch": 2}),
    ("mixed", {"dp": 2, "micro_batch": 2}),
    ("mixed", {"ep": 2, "micro_batch": 2}),
    ("mixed", {"ep": 4, "micro_batch": 1}),
    ("mixed", {"ep": 2, "micro_batch": 2, "experts": "ep"}),
    ("mixed", {"ep": 2, "dp": 2, "micro_batch": 1}),
    ("mixed", {"ep": 2, "tp": 2, "micro_batch": 2}),
    ("mixed", {"ep": 2, "cp": 2, "micro_batch": 2, "cp_layout": "zigzag"}),
    ("mixed", {"ep": 2, "pp": 2, "micro_batch": 2}),
    ("mixed", {"ep": 2, "pp": 2, "tp": 2, "micro_batch": 2, "recompute": True}),
    ("mixed", {"ep": 2, "dp": 2, "pp": 2, "micro_batch": 1, "schedule": "fill-drain"}),
    ("mixed unet", {"tp": 2, "pp": 2, "micro_batch": 2, "schedule": "interleaved", "chunks": 2}),
    ("mixed", {"ep": 2, "cp": 2, "tp": 2, "micro_batch": 2, "attention": "rsa"}),
]


@pytest.mark.parametrize(("name", "choices"), CASES)
def test_a_layout_is_one_process(name: str, choices: dict[str, Any]) -> None:
    job, reference = expected(name)
    kit.compare(job, kit.plan_of(job, **choices), reference)


@pytest.mark.parametrize(
    ("adapters", "choices"),
    [
        (kit.ADAPTERS, {"tp": 2}),
        (kit.DROPPING_ADAPTERS, {"tp": 3, "pp": 2, "recompute": True}),
        (kit.DROPPING_ADAPTERS, {"dp": 2, "cp": 2}),
    ],
)
def test_adapters_too(adapters: Adapters, choices: dict[str, Any]) -> None:
    job = kit.job_of(kit.DENSE)
    object.__setattr__(job, "adapters", adapters)  # a new model has none of its own; here it saves loading one
    kit.compare(job, kit.plan_of(job, micro_batch=2, **choices), kit.reference(job))


@pytest.mark.parametrize(
    "choices",
    [
        {"pp": 2, "dp": 2, "micro_batch": 1},
        {"tp": 2, "cp": 2, "micro_batch": 2},
        {"pp": 2, "micro_batch": 1, "schedule": "interleaved", "chunks": 2},
    ],
)
def test_delays_change_no_bit(choices: dict[str, Any]) -> None:
    job, _ = expected("dense")
    plan = kit.plan_of(job, **choices)
    steady, shaken = kit.run(job, plan), kit.run(job, plan, jitter_s=0.02)
    for a, b in zip(steady, shaken, strict=True):
        assert a["losses"] == b["losses"]
        assert a["norms"] == b["norms"]
        for name, (_, value) in a["weights"].items():
            assert torch.equal(value, b["weights"][name][1])


def test_every_schedule_gives_the_same_bits() -> None:
    # The norm is a sum over ranks, which hold other layers with other chunks: without clipping it touches nothing.
    job = kit.job_of(optimizer=Optimizer(clip_norm=None))
    found = [
        kit.assembled(kit.run(job, kit.plan_of(job, pp=2, micro_batch=1, **how)), "weights")
        for how in (
            {"schedule": "fill-drain"},
            {"schedule": "1f1b"},
            {"schedule": "interleaved", "chunks": 2},
            {"schedule": "looped", "chunks": 2},
        )
    ]
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_a_pass_that_is_computed_again_drops_the_same() -> None:
    job, _ = expected("dropped")
    kept, again = (kit.one_process(job, kit.plan_of(job, micro_batch=2, recompute=way)) for way in (False, True))
    assert kept["losses"] == again["losses"]
    for what in ("gradients", "weights"):
        assert all(torch.equal(value, again[what][name][1]) for name, (_, value) in kept[what].items())


def test_dropping_changes_training_alone() -> None:
    (plain, without), (dropping, having) = expected("dense"), expected("dropped")
    assert dropping.drops
    assert not plain.drops
    assert having["evaluated"][0] == without["evaluated"][0]
    assert abs(having["losses"][0] / without["losses"][0] - 1) > 1e-6


def test_a_skip_connection_sends_its_tensor_and_its_gradient_and_nothing_else() -> None:
    choices: dict[str, Any] = {"pp": 2, "tp": 2, "micro_batch": 2, "layers": (3, 2)}
    plain, shaped = (kit.job_of(replace(kit.UNET, dropout=0.0, skips=skips)) for skips in ("none", "unet"))
    found = [kit.run(job, kit.plan_of(job, **choices)) for job in (plain, shaped)]
    rows = 8 * kit.LENGTH
    part = rows * kit.UNET.hidden * 8 // 2  # fp64, each tensor rank half of it, which those that receive halves swap
    for without, having in zip(*found, strict=True):
        assert [b - a for a, b in zip(without["sent_bytes"], having["sent_bytes"], strict=True)] == [2 * 2 * part] * 2


@pytest.mark.parametrize("name", SHAPES)
def test_one_process_has_the_gradients_of_the_mean_loss(name: str) -> None:
    """Against autograd alone: nothing of the trainer but which sequences a step sees."""
    shape = SHAPES[name]
    job = kit.job_of(shape, optimizer=Optimizer(clip_norm=None))
    spec = shape.spec(vocab=kit.VOCAB, positions=kit.LENGTH)
    stage = CausalStage(spec, dtype=torch.float64, dropout=shape.dropout)
    initialise(stage, seed=job.seed)
    data, _ = kit.samples()
    tokens, targets = (torch.from_numpy(part) for part in data.at(data.batch(0, job.global_batch)))
    keys = token_keys(job.seed, 0, data.batch(0, job.global_batch), torch.arange(kit.LENGTH))
    loss = stage(tokens, targets, length=kit.LENGTH, keys=keys) / targets.numel()
    loss.backward()
    found = kit.reference(job)
    assert found["losses"][0] == pytest.approx(loss.item(), rel=1e-12)
    for parameter_name, parameter in stage.named_parameters():
        torch.testing.assert_close(found["gradients"][parameter_name][1], parameter.grad, rtol=1e-10, atol=1e-14)
