"""Mutants of each way to split training, all killed: orders of pipelines, tensors, rings, lent experts."""

from __future__ import annotations

import pytest

from tests.mutants.test_mutants import Mutant, assert_green, assert_killed, by_area

pytestmark = pytest.mark.slow

_EQUAL = ["tests/train/test_equivalence.py"]
TESTS = {
    "pipelines": ["tests/core/test_orders.py", "tests/core/test_partition.py", "tests/train/test_pipeline.py", *_EQUAL],
    "tensors": ["tests/models/parallel/test_tensor.py", "tests/models/test_causal.py", *_EQUAL],
    "sequences": ["tests/models/parallel/test_sequence.py", *_EQUAL],
    "experts": ["tests/models/parallel/test_experts.py", *_EQUAL],
}
MUTANTS = {
    "pipelines": [
        Mutant("a rank warms up once less", "core/orders.py", ", ranks - rank - 1\n", ", max(0, ranks - rank - 2)\n"),
        Mutant(
            "chunks come in the wrong turn",
            "core/orders.py",
            "for chunk in range(chunks)\n",
            "for chunk in range(chunks - 1, -1, -1)\n",
        ),
        Mutant(
            "interleaved warms up as plain does",
            "core/orders.py",
            "2 * (ranks - rank - 1) + (chunks - 1) * ranks",
            "ranks - rank - 1",
        ),
        Mutant(
            "a backward needs no gradient",
            "core/orders.py",
            "[message.source for message in self.inputs(action)]",
            '[message.source for message in self.inputs(action) if action.kind == "forward"]',
        ),
        Mutant("a full link takes one more", "core/orders.py", ">= self.slots and", "> self.slots and"),
        Mutant(
            "one cut is a layer late",
            "core/partition.py",
            "for start in range(end - 1, part - 2, -1):",
            "for start in range(end - 1, part - 1, -1):",
        ),
        Mutant("losses are not scaled", "train/pipeline.py", "y = y * self.passage.scale", "y = y * 1.0"),
        Mutant(
            "messages of all micro-batches have one number",
            "train/pipeline.py",
            "(micro_batch * self.order.stages + stage) * 2 + KINDS.index(kind)",
            "stage * 2 + KINDS.index(kind)",
        ),
        Mutant(
            "what came in gets no gradient",
            "train/pipeline.py",
            "tensor.requires_grad_()",
            "tensor.requires_grad_(False)",
        ),
        Mutant(
            "the loss is of the last micro-batch",
            "train/pipeline.py",
            "self.total += y.detach().double()",
            "self.total = y.detach().double()",
        ),
    ],
    "tensors": [
        Mutant(
            "the first place does not get more",
            "parallel/tensor.py",
            "start = rank * each + min(rank, over)",
            "start = rank * each",
        ),
        Mutant(
            "inputs' gradients are not summed",
            "parallel/tensor.py",
            "return ctx.axis.all_reduce_(gradient.clone(memory_format=torch.contiguous_format)), None",
            "return gradient, None",
        ),
        Mutant(
            "outputs are not summed",
            "parallel/tensor.py",
            "return axis.all_reduce_(x.clone(memory_format=torch.contiguous_format))",
            "return x.clone()",
        ),
        Mutant(
            "outputs' gradients are summed again",
            "parallel/tensor.py",
            "-> tuple[torch.Tensor, None]:\n        return gradient, None",
            "-> tuple[torch.Tensor, None]:\n        return gradient * 2, None",
        ),
        Mutant("absent tokens take row 0", "parallel/tensor.py", "rows.masked_fill(absent[..., None], 0.0)", "rows"),
        Mutant(
            "the largest logit is the rank's own",
            "parallel/tensor.py",
            "axis.maximum_(logits.amax(1))",
            "logits.amax(1)",
        ),
        Mutant(
            "targets of other ranks count here",
            "parallel/tensor.py",
            "-scale.masked_fill(~here[:, None], 0.0)",
            "-scale",
        ),
        Mutant(
            "ignored targets count",
            "parallel/tensor.py",
            "(total.log() + largest - chosen).masked_fill(~counted, 0.0)",
            "total.log() + largest - chosen",
        ),
        Mutant(
            "a stretch of a boundary is another rank's",
            "parallel/tensor.py",
            "flat.split(_sizes(flat.numel(), axis))[axis.rank]",
            "flat.split(_sizes(flat.numel(), axis))[0]",
        ),
        Mutant(
            "the router's gradient is a part of a sum and not summed",
            "models/causal_layers.py",
            "start=(0, 0), partial=tp)",
            "start=(0, 0))",
        ),
    ],
    "sequences": [
        Mutant(
            "RSA does not scale its scores",
            "parallel/rsa.py",
            "scaled = q.unflatten(1, (k.shape[1], -1)) * (1 / math.sqrt(q.shape[-1]))",
            "scaled = q.unflatten(1, (k.shape[1], -1)) * 1.0",
        ),
        Mutant(
            "RSA's queries have gradients of scores that were not scaled",
            "parallel/rsa.py",
            "dq *= 1 / math.sqrt(scaled.shape[-1])",
            "dq *= 1.0",
        ),
        Mutant(
            "RSA's values lie a block off",
            "parallel/rsa.py",
            "out += weights[..., source * local : (source + 1) * local]",
            "out += weights[..., axis.rank * local : (axis.rank + 1) * local]",
        ),
        Mutant(
            "RSA's softmax forgets its rows' sums",
            "parallel/rsa.py",
            "torch._softmax_backward_data(back, weights, -1, weights.dtype, grad_input=back)",
            "back.mul_(weights)",
        ),
        Mutant(
            "a ring stops a place early",
            "parallel/ring.py",
            "for step in range(axis.size):",
            "for step in range(axis.size - (axis.size > 2)):",
        ),
        Mutant(
            "visitors come from the other side",
            "parallel/ring.py",
            "yield (axis.rank - step) % axis.size, current",
            "yield (axis.rank + step) % axis.size, current",
        ),
        Mutant(
            "gradients on their way are dropped",
            "parallel/ring.py",
            "return self._own if self._pending is None else self._joined(self._own, self._pending.wait())",
            "return self._own if self._pending is None else (self._pending.wait(), self._own)[1]",
        ),
        Mutant(
            "the mask is that of contiguous places",
            "parallel/rsa.py",
            "keys = order(length, axis.size, layout)",
            'keys = order(length, axis.size, "contiguous")',
        ),
        Mutant(
            "a block's rows are not weighed",
            "parallel/blockwise.py",
            ".add_(part * (log - finite).exp_()[..., None])",
            ".add_(part)",
        ),
        Mutant(
            "the visiting block is a triangle too",
            "parallel/blockwise.py",
            "causal and other.start == at.start, columns",
            "causal, columns",
        ),
        Mutant(
            "positions are local",
            "parallel/layout.py",
            "return torch.cat([_range(piece) for piece in pieces(length, axis.rank, axis.size, layout)])",
            "return torch.cat([_range(piece) for piece in pieces(length, 0, axis.size, layout)])",
        ),
        Mutant(
            "zigzag's second stretch is the first's neighbour",
            "parallel/layout.py",
            "[place, count - 1 - place]",
            "[2 * place, 2 * place + 1]",
        ),
    ],
    "experts": [
        Mutant(
            "helpers' own tokens to come are forgotten",
            "parallel/expert_plan.py",
            "min(range(self.world), key=self.load.__getitem__)",
            "min(range(self.world), key=lambda e: self.assigned[e] if self.load[e] < math.inf else math.inf)",
        ),
        Mutant(
            "experts are placed by number",
            "parallel/expert_plan.py",
            "key=self.counts.__getitem__, reverse=True",
            "key=lambda e: e",
        ),
        Mutant(
            "an owner's own load stays pending",
            "parallel/expert_plan.py",
            "held = self.load[owner] - (count - stays)",
            "held = self.load[owner]",
        ),
        Mutant(
            "least parts are not kept to",
            "parallel/expert_plan.py",
            "(part >= self.min_tokens or part == left)",
            "True",
        ),
        Mutant(
            "capacity knows no factor",
            "parallel/expert_plan.py",
            "int(alpha * (sum(counts) // world))",
            "int(sum(counts) // world)",
        ),
        Mutant(
            "a copy's number is of its own rank",
            "parallel/expert_plan.py",
            "begins = ends - counts",
            "begins = 0 * counts",
        ),
        Mutant(
            "lent weights get no gradient home",
            "parallel/experts.py",
            "found[at][row] += pending.wait()",
            "pending.wait()",
        ),
        Mutant(
            "rows come back in the order of the places",
            "parallel/experts.py",
            "torch.empty_like(gradient).index_copy_(0, order, gradient), None",
            "gradient.index_select(0, order), None",
        ),
        Mutant(
            "gates are not normed over the chosen",
            "parallel/experts.py",
            "gates = best.softmax(-1)\n        return self.dispatch",
            "gates = best.sigmoid()\n        return self.dispatch",
        ),
        Mutant(
            "the helper uses its own expert's weights",
            "parallel/experts.py",
            "gate, up, down = came[3 * at : 3 * at + 3]",
            "gate, up, down = gates[0], ups[0], downs[0]",
        ),
        Mutant(
            "imbalance is by expert",
            "parallel/expert_plan.py",
            "return float(loads.max() * world / total) if total else 1.0",
            "return float(np.max(counts) * len(counts) / total) if total else 1.0",
        ),
    ],
}


@pytest.mark.parametrize(("area", "mutant"), by_area(MUTANTS))
def test_a_mutant_is_killed(area: str, mutant: Mutant) -> None:
    assert_killed(TESTS[area], mutant)


@pytest.mark.parametrize("area", TESTS)
def test_the_tests_pass_without_a_mutant(area: str) -> None:
    assert_green(TESTS[area])
