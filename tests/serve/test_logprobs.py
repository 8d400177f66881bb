"""Log-probabilities beside a plain reference, and choosing within a mask."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from stretto.serve.backend import Row
from stretto.serve.choosing import allowed_tokens, choose
from stretto.serve.logprobs import logprob_of
from stretto.serve.request import Request
from stretto.serve.sampling import Sampling

LOGITS = np.random.default_rng(5).standard_normal((6, 301)).astype(np.float32) * 4


def row(number: int, sampling: Sampling, **more: object) -> Row:
    return Row(id=number, tokens=(1,), start=9, table=(0,), sampling=sampling, position=10, **more)  # type: ignore[arg-type]


def mask(allowed: list[int]) -> bytes:
    bits = np.zeros(304, dtype=np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def test_logprobs_are_those_of_the_whole_vocabulary() -> None:
    expected = log_softmax(LOGITS[0].astype(np.float64))
    found = logprob_of(LOGITS[0], 17, 20)
    assert found.logprob == pytest.approx(expected[17], abs=1e-12)
    assert [token for token, _ in found.top] == np.argsort(-expected, kind="stable")[:20].tolist()
    assert [value for _, value in found.top] == pytest.approx(np.sort(expected)[::-1][:20].tolist(), abs=1e-12)
    everything = logprob_of(LOGITS[0], 0, 301)
    assert sum(np.exp(value) for _, value in everything.top) == pytest.approx(1.0, abs=1e-12)


def test_equal_alternatives_come_by_number_and_huge_logits_do_not_overflow() -> None:
    logits = np.array([1e4, 2e4, 2e4, -1e4], dtype=np.float32)
    found = logprob_of(logits, 3, 3)
    assert [token for token, _ in found.top] == [1, 2, 0]
    assert found.top[0][1] == pytest.approx(-np.log(2))
    assert found.logprob == pytest.approx(-3e4 - np.log(2))


def test_logprobs_know_nothing_of_temperature_cuts_masks_and_neighbours() -> None:
    how = [Sampling(), Sampling(temperature=2.0, seed=1), Sampling(temperature=0.3, top_k=3, top_p=0.5, seed=1)]
    rows = [row(i, each, logprobs=4) for i, each in enumerate(how)]
    rows.append(row(3, Sampling(), logprobs=4, mask=mask([5, 8])))
    same = np.repeat(LOGITS[:1], 4, axis=0)
    _, together = choose(same, rows)
    assert len({found.top for (found,) in together.values()}) == 1
    _, alone = choose(same[:1], rows[1:2])
    assert alone[1] == together[1]


def test_only_who_asks_is_told() -> None:
    tokens, logprobs = choose(LOGITS[:2], [row(4, Sampling()), row(9, Sampling(), logprobs=0)])
    assert tokens == {4: (int(LOGITS[0].argmax()),), 9: (int(LOGITS[1].argmax()),)}
    assert list(logprobs) == [9]
    assert logprobs[9][0].top == ()
    assert logprobs[9][0].token == tokens[9][0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=50.0, seed=3), Sampling(temperature=1, top_k=2)])
def test_a_mask_binds_its_own_row_alone(sampling: Sampling) -> None:
    free, _ = choose(LOGITS, [row(i, sampling) for i in range(6)])
    allowed = [3, 100, 300]
    for bound in range(6):
        rows = [row(i, sampling, mask=mask(allowed) if i == bound else None) for i in range(6)]
        tokens, _ = choose(LOGITS, rows)
        assert tokens[bound][0] in allowed
        assert all(tokens[i] == free[i] for i in range(6) if i != bound)
        if sampling.greedy:
            assert tokens[bound][0] == max(allowed, key=lambda token: LOGITS[bound, token])


def test_a_mask_ends_where_the_vocabulary_does() -> None:
    assert allowed_tokens(b"\xff" * 38, 301).tolist() == list(range(301))
    assert allowed_tokens(mask([0, 9, 300]), 301).tolist() == [0, 9, 300]


def test_plain_rows_want_the_largest_logit_and_nothing_else() -> None:
    assert row(0, Sampling()).plain
    assert not row(0, Sampling(temperature=0.1)).plain
    assert not row(0, Sampling(), logprobs=0).plain
    assert not row(0, Sampling(), mask=mask([1])).plain


@pytest.mark.parametrize("wrong", [-1, 21])
def test_a_request_may_ask_for_twenty_alternatives(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"logprobs.*0 \.\. 20"):
        Request(id=0, prompt=(1,), limit=1, logprobs=wrong)
