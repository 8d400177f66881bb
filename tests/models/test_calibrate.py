"""What calibration makes of timed passes; the passes themselves are timed by the command-line tests."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from stretto.hardware.device import Device  # noqa: E402
from stretto.hardware.table import Table  # noqa: E402
from stretto.models import calibrate  # noqa: E402
from stretto.models.load import Model, load_model  # noqa: E402
from stretto.models.passes import PassShape  # noqa: E402

DECODE = PassShape(new_tokens=(1, 1), cached=(8, 8))
PROMPT = PassShape(new_tokens=(12,), cached=(0,))


@pytest.fixture(scope="module")
def model(packaged: Path) -> Model:
    return load_model(str(packaged), threads=1)


def tables_of(model: Model, seconds: float) -> dict[str, Table]:
    """Tables in which every operation and the pass itself take `seconds`, whatever their size."""
    found = {}
    for shape in (DECODE, PROMPT):
        for op in model.spec.operations(shape, dtype=model.dtype):
            axes = tuple(f"axis{i}" for i in range(len(op.at)))
            found[f"{op.signature}@1"] = Table(axes=axes, points=(op.at,), values=(seconds,), beyond="constant")
    own = Table(axes=("rows",), points=((1.0,),), values=(seconds,), beyond="constant")
    return found | {f"{calibrate.pass_signature(model.spec, model.dtype)}@1": own}


def counted(model: Model, shape: PassShape) -> int:
    return 1 + sum(op.count for op in model.spec.operations(shape, dtype=model.dtype))


def test_pace_weighs_passes_by_how_often_they_occur(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {DECODE: 0.3, PROMPT: 0.9}
    monkeypatch.setattr(calibrate, "_run", lambda _, cache, shape: {"": took[shape]})
    monkeypatch.setattr(calibrate, "_nearest", lambda shape, most: shape)
    tables = tables_of(model, 1e-3)
    found = calibrate.pace(model, tables, threads=1, passes=[(DECODE, 10.0), (PROMPT, 1.0)])
    said = 1e-3 * (10 * counted(model, DECODE) + counted(model, PROMPT))
    assert found == pytest.approx((10 * 0.3 + 0.9) / said)


def test_a_device_at_half_the_pace_takes_twice_as_long(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_run", lambda _, cache, shape: {"": 0.5})
    monkeypatch.setattr(calibrate, "_nearest", lambda shape, most: shape)
    device = Device(name="x", kind="cpu", memory_bytes=1, bandwidth=1, peak_flops={}, measured=tables_of(model, 1e-3))
    slow = device.at_pace(2.0)
    paces = [calibrate.pace(model, d.measured, threads=1, passes=[(DECODE, 1.0)]) for d in (device, slow)]
    assert paces[0] == pytest.approx(2 * paces[1])
    with pytest.raises(ValueError, match="factor"):
        device.at_pace(0.0)


def test_pace_tries_passes_that_were_calibrated() -> None:
    grid = list(calibrate._grid())
    for shape in (DECODE, PROMPT, PassShape(new_tokens=(1,) * 9, cached=(700,) * 9)):
        near = calibrate._nearest(shape, 2048)
        assert near in grid
        assert (max(near.new_tokens) > 1) == (max(shape.new_tokens) > 1)
    assert calibrate._nearest(PassShape(new_tokens=(350,), cached=(0,)), 2048).new_tokens == (384,)
    assert calibrate._nearest(PassShape(new_tokens=(1,) * 9, cached=(128,) * 9), 2048).rows == 8
    assert calibrate._nearest(DECODE, 8) == calibrate._within(DECODE, 8)  # nothing of the grid fits


def test_contexts_beyond_the_cache_are_cut_to_fit() -> None:
    assert calibrate._within(PassShape(new_tokens=(5, 1), cached=(90, 3)), 50) == PassShape(
        new_tokens=(5, 1), cached=(45, 3)
    )


def test_spread_counts_the_samples_and_the_machine() -> None:
    steady = calibrate._variation([1.0] * 10)
    assert steady == 0.0
    assert calibrate._variation([1.0, 1.0, 1.0, 2.0, 2.0]) == pytest.approx(1.0)
    table = calibrate._table("matmul/x", {(1.0,): [1.0, 1.0], (2.0,): [2.0, 2.0]}, moves=0.25)
    assert table.spread == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("seconds", "times", "runs"),
    [(0.001, 7, 8), (0.15, 2, 3), (0.3, 2, 2), (0.9, 2, 2), (1.5, 1, 1)],
)
def test_a_pass_is_timed_the_less_often_the_longer_it_takes(
    monkeypatch: pytest.MonkeyPatch, seconds: float, times: int, runs: int
) -> None:
    """The first is set-up, and not counted unless it is long."""
    ran: list[PassShape] = []
    monkeypatch.setattr(calibrate, "_run", lambda _, cache, shape: ran.append(shape) or {"": seconds})
    assert list(calibrate._timed(None, None, DECODE)) == [{"": seconds}] * times  # type: ignore[arg-type]
    assert len(ran) == runs
