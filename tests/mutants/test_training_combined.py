"""Mutants of what ways to split training share, all killed: where they combine, dropout, skip connections, bytes.

The first list holds faults of the kind of those numbered in the public thread NVIDIA/Megatron-LM issue 7452: gradients
that are silently wrong when two ways to split a model meet.
"""

from __future__ import annotations

import pytest

from tests.mutants.test_mutants import Mutant, assert_green, assert_killed, by_area

pytestmark = pytest.mark.slow

_EQUAL = ["tests/train/test_equivalence.py"]
TESTS = {
    "combined": _EQUAL,
    "dropout": [
        "tests/models/test_dropout.py",
        "tests/models/test_causal.py::test_every_place_that_drops_has_a_number_of_its_own",
        *_EQUAL,
    ],
    "skips": [
        "tests/core/test_orders.py",
        "tests/models/test_causal.py::test_skip_connections_are_what_their_definition_says",
        "tests/train/test_plan.py::test_skip_connections_lead_from_stage_to_stage",
        *_EQUAL,
    ],
    "bytes": ["tests/train/test_memory.py"],
}
MUTANTS = {
    "combined": [
        Mutant(
            "gradients are not summed over sequence ranks",
            "train/optimize.py",
            'DATA_AXES = ("dp", "ep", "cp")',
            'DATA_AXES = ("dp", "ep")',
        ),
        Mutant(
            "gradients of whole weights are not summed over expert ranks",
            "train/optimize.py",
            'DATA_AXES = ("dp", "ep", "cp")',
            'DATA_AXES = ("dp", "cp")',
        ),
        Mutant(
            "experts' gradients are summed over the ranks that share them out",
            "train/optimize.py",
            "axes = (*(axis for axis in DATA_AXES if axis not in place.split), *place.partial)",
            "axes = (*DATA_AXES, *place.partial)",
        ),
        Mutant(
            "partial gradients on tensor ranks are not summed",
            "train/optimize.py",
            "if axis not in place.split), *place.partial)",
            "if axis not in place.split),)",
        ),
        Mutant("tied copies go their own ways", "train/optimize.py", "part += theirs", "theirs += 0"),
        Mutant(
            "a tied copy counts twice in the norm",
            "train/optimize.py",
            'return name != "lm_head.weight" or',
            "return True or",
        ),
        Mutant(
            "tensor ranks count whole weights each",
            "train/optimize.py",
            'self._counts(name, parameter, place, ("tp", "ep"))',
            'self._counts(name, parameter, place, ("ep",))',
        ),
        Mutant(
            "the norm leaves out other tensor ranks",
            "train/optimize.py",
            'self.transport.axis("pp", "ep", "tp")',
            'self.transport.axis("pp", "ep")',
        ),
        Mutant(
            "the norm leaves out other stages",
            "train/optimize.py",
            'self.transport.axis("pp", "ep", "tp")',
            'self.transport.axis("ep", "tp")',
        ),
        Mutant(
            "losses are a mean over this rank's tokens",
            "train/trainer.py",
            "tokens = len(numbers) * self.job.sequence\n        loss",
            "tokens = len(numbers) * self.job.sequence // self.plan.data_ranks\n        loss",
        ),
        Mutant(
            "data ranks read the same sequences",
            "train/trainer.py",
            "mine = numbers[place * each : (place + 1) * each]",
            "mine = numbers[:each]",
        ),
        Mutant(
            "targets are those of another layout",
            "train/trainer.py",
            "split_sequence(part, self._cp, 1, layout) for part",
            'split_sequence(part, self._cp, 1, "contiguous") for part',
        ),
        Mutant(
            "the loss leaves out other sequence ranks",
            "train/trainer.py",
            '"pp", "dp", "ep", "cp").all_reduce_',
            '"pp", "dp", "ep").all_reduce_',
        ),
    ],
    "dropout": [
        Mutant(
            "every step has the same masks",
            "models/dropout.py",
            "counter[..., 2] = step & 0xFFFFFFFF",
            "counter[..., 2] = 0",
        ),
        Mutant(
            "shifts bring the sign",
            "models/dropout.py",
            "(words >> shift).bitwise_and_((1 << (64 - shift)) - 1)",
            "words >> shift",
        ),
        Mutant("what stays is not scaled", "models/dropout.py", "_LEVELS / (_LEVELS - self.level)", "1.0"),
        Mutant(
            "a part's channels are numbered from 0", "models/causal_layers.py", "part.start if dim == 1 else 0", "0"
        ),
        Mutant(
            "all layers have the same masks",
            "models/causal_layers.py",
            "return layer * len(_PLACES) + _PLACES.index(name)",
            "return _PLACES.index(name)",
        ),
        Mutant(
            "a pass that is computed again draws anew",
            "models/causal.py",
            "checkpoint(layer, *inputs, use_reentrant=False)",
            "checkpoint(lambda x, turns, keys, skip, seen=[]: layer(x, turns, keys if keys is None or seen.append(1) "
            "or len(seen) < 2 else keys + 1, skip), *inputs, use_reentrant=False)",
        ),
        Mutant(
            "each rank numbers its sequences from 0",
            "train/trainer.py",
            "token_keys(self.job.seed, self.step, mine, where)",
            "token_keys(self.job.seed, self.step, range(len(mine)), where)",
        ),
        Mutant(
            "each rank numbers its positions from 0",
            "train/trainer.py",
            "where = positions(self.job.sequence, self._cp, layout)",
            "where = torch.arange(tokens.shape[1])",
        ),
        Mutant("evaluation drops too", "train/trainer.py", "if training and self.job.drops:", "if self.job.drops:"),
    ],
    "skips": [
        Mutant(
            "layers meet the wrong ones",
            "models/spec.py",
            "(layer, layers - 1 - layer)",
            "(layer, layers - layers // 2 + layer)",
        ),
        Mutant(
            "a skip connection begins as noise",
            "models/causal_weights.py",
            '("norm.weight", "skip.weight")',
            '"norm.weight"',
        ),
        Mutant("what comes in is no layer's result", "models/causal.py", "under_way.setdefault(before, x)", "pass"),
        Mutant("gradients go the way of the tensors", "core/orders.py", "pair if forward else pair[::-1]", "pair"),
        Mutant(
            "nobody waits for a skip connection",
            "core/order_schedule.py",
            "messages.get(message, actions[message.source])",
            "actions[message.source]",
        ),
        Mutant(
            "a stage sends what the next one has anyway",
            "train/plan.py",
            "self.stage_layers(last).start == made + 1",
            "False",
        ),
        Mutant(
            "the stage's own result goes by every line",
            "train/pipeline.py",
            "made[message.skip] = skips[message.skip]",
            "made[message.skip] = y",
        ),
        Mutant(
            "gradients of skip connections are lost",
            "train/pipeline.py",
            "backward(list(held.made.values()), [came.get(skip) for skip in held.made])",
            "backward(held.made[None], came.get(None))",
        ),
        Mutant("all lines have one number", "train/pipeline.py", "(1 + len(self.order.skips)) + line", "1"),
    ],
    "bytes": [
        Mutant(
            "what came by skip connections takes no room",
            "train/memory.py",
            "return ((action.stage > 0) + skips) * self.boundary",
            "return (action.stage > 0) * self.boundary",
        ),
        Mutant(
            "masks take no room",
            "train/traced.py",
            "torch.zeros_like(tokens) if drops else None",
            "None",
        ),
    ],
}


@pytest.mark.parametrize(("area", "mutant"), by_area(MUTANTS))
def test_a_mutant_is_killed(area: str, mutant: Mutant) -> None:
    assert_killed(TESTS[area], mutant)


@pytest.mark.parametrize("area", TESTS)
def test_the_tests_pass_without_a_mutant(area: str) -> None:
    assert_green(TESTS[area])
