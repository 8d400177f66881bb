"""Seconds of a step: what they must grow with, and what published simulators of serving leave out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.hardware import catalog, collective, cost
from stretto.models.passes import PassShape
from stretto.serve.deploy.costs import GRAPH_ROWS, Lane, StepCosts
from stretto.serve.deploy.curves import layer_messages
from stretto.serve.deploy.engines import engine, engines
from stretto.serve.deploy.layout import Layout

from .worlds import EXPERTS, MACHINE, SMALL, TYPES, costs

FREE = replace(engine("vllm-0.6"), host_step_s=0.0, host_sequence_s=0.0, eager_layer_s=0.0, kernel_pace=1.0)


def decoding(rows: int, context: int) -> Lane:
    return Lane(rows=rows, tokens=rows, sequences=rows, decoders=rows, cached=rows * context)


def prompt(of: StepCosts, tokens: int, cached: int = 0) -> Lane:
    return Lane(rows=tokens, tokens=1, sequences=1, prompt_s=of.prompt_attention_s(tokens, cached), eager=True)


@pytest.mark.parametrize(("rows", "context"), [(1, 100), (8, 900), (64, 3000), (256, 500)])
def test_a_decode_step_is_the_sum_of_the_models_operations(rows: int, context: int) -> None:
    listed = SMALL.operations(PassShape(new_tokens=(1,) * rows, cached=(context - 1,) * rows), dtype="bf16")
    said = costs(constants=FREE).stage([decoding(rows, context)]).kernels
    sampling = 6 * 4 * rows * SMALL.vocab / (MACHINE.device.bandwidth * 0.5804) + 3e-6
    assert said == pytest.approx(cost.total(listed, MACHINE.device).seconds + sampling, rel=0.01)


@pytest.mark.parametrize("tokens", [16, 300, 2048])
def test_a_prompt_step_is_the_sum_of_the_models_operations(tokens: int) -> None:
    listed = SMALL.operations(PassShape(new_tokens=(tokens,), cached=(0,)), dtype="bf16")
    free = costs(constants=FREE)
    said = free.stage([prompt(free, tokens)]).kernels
    assert said == pytest.approx(cost.total(listed, MACHINE.device).seconds, rel=0.03)


def test_decoding_grows_with_every_cached_position() -> None:
    """Trap: attention that is looked up without the cached length makes long contexts free."""
    free = costs(constants=FREE)
    seconds = [free.stage([decoding(32, context)]).total for context in (100, 1000, 10000, 60000)]
    assert seconds == sorted(seconds)
    moved = 32 * 50000 * SMALL.kv_bytes_per_token("bf16")
    assert seconds[3] - seconds[2] == pytest.approx(moved / (MACHINE.device.bandwidth * 0.8), rel=0.02)


def test_grouped_heads_are_not_costed_as_full_ones() -> None:
    """Trap: a QKV product of three times the query heads."""
    full = replace(SMALL, kv_heads=SMALL.heads)
    grouped, whole = (costs(spec=spec, constants=FREE).stage([decoding(1, 1)]).kernels for spec in (SMALL, full))
    fewer = SMALL.layers * SMALL.hidden * 2 * (full.kv_width - SMALL.kv_width) * 2
    assert whole - grouped == pytest.approx(fewer / (MACHINE.device.bandwidth * 0.948), rel=0.15)


def test_quadratic_attention_is_not_that_of_the_mean_prompt() -> None:
    """Trap: prompts of 100 and 7,900 tokens are not two of 4,000."""
    of = costs(constants=FREE)
    unlike = of.prompt_attention_s(100, 0) + of.prompt_attention_s(7900, 0)
    assert unlike > 1.5 * 2 * of.prompt_attention_s(4000, 0)


def test_a_chunk_pays_for_what_is_cached() -> None:
    of = costs(constants=FREE)
    assert of.prompt_attention_s(512, 8192) > 5 * of.prompt_attention_s(512, 0)


def test_head_norms_sampling_and_host_are_charged() -> None:
    """Trap: no norms, head, sampling or launches, so that everything comes out too fast."""
    own = engine("vllm-0.6")
    with_host, without = costs(constants=own), costs(constants=FREE)
    lane = decoding(10, 500)
    host = own.host_step_s + 10 * own.host_sequence_s
    assert with_host.stage([lane]).engine == pytest.approx(host)
    silent = lane._replace(tokens=0)
    head = SMALL.vocab * SMALL.hidden * 2 / MACHINE.device.bandwidth
    assert without.stage([lane]).kernels - without.stage([silent]).kernels > head
    paced = costs(constants=replace(FREE, kernel_pace=1.5)).stage([lane])
    assert paced.kernels == pytest.approx(1.5 * without.stage([lane]).kernels)


def test_peaks_are_dense() -> None:
    """Trap: the sheet's figure for structured sparsity, of which half is real."""
    assert MACHINE.device.peak("bf16") == 989e12


def test_eager_steps_wait_for_their_launches() -> None:
    slow = costs(constants=replace(FREE, eager_layer_s=1e-3))
    short, long = slow.stage([prompt(slow, 8)]), slow.stage([prompt(slow, 8192)])
    assert short.total == pytest.approx(SMALL.layers * 1e-3, rel=0.05)
    assert long.engine < 0.6 * short.engine
    assert slow.stage([decoding(8, 100)]).engine == 0.0  # replayed as a graph
    assert slow.stage([decoding(GRAPH_ROWS + 1, 100)]).engine > 0.0


def test_twice_the_blocks_take_twice_the_seconds() -> None:
    deep = replace(SMALL, layers=2 * SMALL.layers)
    one, two = (costs(spec=spec, constants=FREE).stage([decoding(8, 500)._replace(tokens=0)]) for spec in (SMALL, deep))
    assert two.total == pytest.approx(2 * one.total)
    half = costs(Layout(stages=2), spec=deep, constants=FREE)
    hop = collective.estimate("send_recv", 8 * SMALL.hidden * 2, 2, catalog.link("nvlink4")).seconds
    assert half.stage([decoding(8, 500)._replace(tokens=0)]).total == pytest.approx(one.total + hop)


@given(rows=st.integers(1, 256), context=st.integers(1, 8000), tokens=st.integers(1, 8000))
def test_a_faster_device_is_never_slower(rows: int, context: int, tokens: int) -> None:
    slow = costs(machine=replace(MACHINE, device=catalog.device("h100-pcie")))
    fast = costs(machine=replace(MACHINE, device=replace(catalog.device("h100-pcie"), bandwidth=4e12)))
    assert fast.stage([decoding(rows, context)]).total <= slow.stage([decoding(rows, context)]).total
    assert fast.stage([prompt(fast, tokens)]).total <= slow.stage([prompt(slow, tokens)]).total


def test_experts_are_read_when_a_row_comes() -> None:
    wide = replace(EXPERTS, hidden=8192)
    free = costs(spec=wide, constants=FREE)
    seconds = [free.stage([decoding(rows, 10)._replace(tokens=0)]).kernels for rows in (1, 4, 64)]
    weights = 3 * wide.hidden * wide.ffn * 2 * SMALL.layers / MACHINE.device.bandwidth
    assert seconds[1] - seconds[0] == pytest.approx((8 * (1 - 0.75**4) - 2) * weights, rel=0.1)
    assert seconds[2] - seconds[1] == pytest.approx(8 * 0.75**4 * weights, rel=0.2)
    split = costs(Layout(devices=4, mlp_split="expert"), spec=EXPERTS, constants=FREE)
    assert split.stage([decoding(64, 10)]).kernels < free.stage([decoding(64, 10)]).kernels


HIDDEN_BYTES = 2.0 * SMALL.hidden


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(), []),
        (Layout(devices=4), [("all_reduce", 4, 1.0), ("all_reduce", 4, 1.0)]),
        (
            Layout(devices=4, attention_replicas=2),
            [
                ("reduce_scatter", 2, 0.5),
                ("all_gather", 4, 1.0),
                ("reduce_scatter", 4, 1.0),
                ("all_gather", 2, 0.5),
            ],
        ),
        (Layout(devices=4, attention_replicas=4), [("all_gather", 4, 1.0), ("reduce_scatter", 4, 1.0)]),
        (
            Layout(devices=4, mlp_replicas=2),
            [
                ("reduce_scatter", 4, 1.0),
                ("all_gather", 2, 0.5),
                ("reduce_scatter", 2, 0.5),
                ("all_gather", 4, 1.0),
            ],
        ),
    ],
    ids=str,
)
def test_messages_between_cells(layout: Layout, expected: list[tuple[str, int, float]]) -> None:
    found = layer_messages(SMALL, layout, 2.0)
    assert [(name, ranks, share) for name, _, ranks, share in found] == expected
    assert {bytes_ for _, bytes_, _, _ in found} <= {HIDDEN_BYTES}


def test_messages_into_experts_and_out_of_them() -> None:
    found = layer_messages(EXPERTS, Layout(devices=4, mlp_split="expert"), 2.0)
    assert [(name, ranks, share) for name, _, ranks, share in found] == [
        ("reduce_scatter", 4, 1.0),
        ("all_to_all", 4, 0.5),
        ("all_to_all", 4, 0.5),
        ("all_gather", 4, 1.0),
    ]


def test_a_group_over_nodes_uses_the_network() -> None:
    near, far = costs(Layout(devices=4)), costs(Layout(devices=16), spec=replace(SMALL, kv_heads=16))
    assert far.stage([decoding(8, 10)]).messages > 2 * near.stage([decoding(8, 10)]).messages
    assert MACHINE.link(8) == catalog.link("nvlink4")
    assert MACHINE.link(9) == catalog.link("ib-ndr400")


def test_attention_replicas_are_in_lock_step() -> None:
    """A step takes as long as the replica that has most to do; their MLPs meet."""
    of = costs(Layout(devices=2, attention_replicas=2), constants=FREE)
    even = of.stage([decoding(8, 1000), decoding(8, 1000)]).kernels
    uneven = of.stage([decoding(8, 1000), decoding(8, 9000)]).kernels
    lone = of.stage([decoding(8, 9000), Lane()]).kernels
    assert uneven > even
    assert uneven >= lone


def test_a_pipelines_cycle_is_its_longest_group_or_its_busiest_stage() -> None:
    of = costs(Layout(stages=4))
    lanes = [[decoding(8, 500)], [decoding(8, 500)], [decoding(8, 500)], [decoding(8, 500)]]
    one = of.stage(lanes[0]).total
    assert of.cycle(lanes).total == pytest.approx(4 * one)
    assert of.cycle([lanes[0], [Lane()], [Lane()], [Lane()]]).total == pytest.approx(4 * one)
    long = [prompt(of, 4096)]
    assert of.cycle([long, *lanes[1:]]).total == pytest.approx(4 * of.stage(long).total)


def test_the_slowest_stage_sets_the_pace_of_an_uneven_pipeline() -> None:
    """Nine layers in two stages: five, or four and the head, whichever takes longer."""
    step, silent = decoding(8, 500), decoding(8, 500)._replace(tokens=0)
    eight, nine, ten = (costs(Layout(stages=2), spec=replace(SMALL, layers=n), constants=FREE) for n in (8, 9, 10))
    assert nine.stage([silent]).total == pytest.approx(ten.stage([silent]).total)
    assert nine.stage([step]).total == pytest.approx(max(ten.stage([silent]).total, eight.stage([step]).total))
    assert nine.stage([step]).total < ten.stage([step]).total
    assert nine.cycle([[step], [step]]).total == pytest.approx(2 * nine.stage([step]).total)
    dear = replace(SMALL, vocab=1_000_000)
    uneven, even = (costs(Layout(stages=2), spec=replace(dear, layers=n), constants=FREE) for n in (9, 8))
    assert uneven.stage([step]).total == pytest.approx(even.stage([step]).total)  # the head is worth many layers
    light = replace(SMALL, vocab=1000)
    uneven, even = (costs(Layout(stages=2), spec=replace(light, layers=n), constants=FREE) for n in (9, 10))
    assert uneven.stage([step]).total == pytest.approx(even.stage([silent]).total)  # five layers, and no head


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_twice_the_layers_are_twice_the_stage_whatever_is_left_over(stages: int) -> None:
    lane = decoding(8, 500)._replace(tokens=0)

    def layers_s(layers: int) -> float:
        of = costs(Layout(stages=stages), spec=replace(SMALL, layers=layers), constants=FREE)
        assert of._hop_start_s > 0
        return of.stage([lane]).total - of._hop_start_s - lane.rows * of._hop_row_s

    each = layers_s(stages)
    for layers in (7, 8, 9, 13):
        assert layers_s(layers) == pytest.approx(-(-layers // stages) * each)
        assert layers_s(2 * stages * layers) == pytest.approx(2 * layers_s(stages * layers))


def test_swaps_pay_for_the_hosts_link() -> None:
    of = costs()
    moved = 1000 * SMALL.kv_bytes_per_token("bf16")
    assert of.copy_s(1000) == pytest.approx(collective.estimate("send_recv", moved, 2, MACHINE.host).seconds)
    assert of.copy_s(0) == 0.0


def test_weights_in_eight_bits_are_read_faster_and_computed_alike() -> None:
    large = replace(SMALL, hidden=8192, ffn=28672)
    narrow = costs(spec=large, types=replace(TYPES, weights="fp8"), constants=FREE)
    wide = costs(spec=large, constants=FREE)
    few, many = decoding(1, 10)._replace(tokens=0), decoding(4096, 10)._replace(tokens=0)
    assert narrow.stage([few]).kernels < 0.75 * wide.stage([few]).kernels
    assert narrow.stage([many]).kernels > 0.9 * wide.stage([many]).kernels


def test_uncertainty_lies_between_its_parts() -> None:
    of = costs(Layout(devices=4))
    parts = of.stage([decoding(8, 500)])
    assert 0.0 < of.spread(parts) < 0.6
    assert of.spread(parts._replace(kernels=0.0, messages=0.0)) == pytest.approx(of.engine.spread)


def test_engines_say_where_their_constants_are_from() -> None:
    assert all(len(constants.source) > 20 for constants in engines().values())
    with pytest.raises(ValueError, match="engine is 'vllm'; it must be one of "):
        engine("vllm")
