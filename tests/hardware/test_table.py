"""Tables: exact at points, bounded in between, honest beyond."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.hardware.table import Table
from stretto.hardware.table_files import read_tables, write_tables

POSITIVE = st.floats(1e-6, 1e6)


@given(st.dictionaries(POSITIVE, POSITIVE, min_size=1, max_size=8), st.sampled_from(["log", "linear"]))
def test_points_are_read_exactly(values: dict[float, float], scale: str) -> None:
    table = Table.line("x", values.items(), scale=scale)
    for x, y in values.items():
        assert table.at(x)[0] == y
        assert table.at(x).basis == "measured"


@given(st.dictionaries(POSITIVE, POSITIVE, min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 2))
def test_between_points_lies_between_values(values: dict[float, float], where: float, spread: float) -> None:
    a, b = sorted(values)[:2]
    x = a + (b - a) * where
    found = Table.line("x", values.items(), spread=spread).at(x)
    low, high = sorted((values[a], values[b]))
    assert low * (1 - 1e-9) <= found.value <= high * (1 + 1e-9)
    assert found.low <= found.value <= found.high


def test_power_laws_are_exact_on_a_logarithmic_scale() -> None:
    table = Table(
        axes=("x", "y"),
        points=tuple((float(x), float(y)) for x in (1, 8) for y in (1, 4, 64)),
        values=tuple(3.0 * x**2 * y for x in (1, 8) for y in (1, 4, 64)),
        beyond="slope",
    )
    for x, y in ((2.0, 2.0), (5.0, 17.0), (16.0, 3.0), (3.0, 200.0)):
        assert table.at(x, y).value == pytest.approx(3 * x**2 * y)
    assert table.at(2.0, 2.0).basis == "interpolated"
    assert table.at(16.0, 3.0).basis == "extrapolated"
    assert table.at(3.0, 200.0).basis == "extrapolated"


def test_rows_may_have_coordinates_of_their_own() -> None:
    """At x = 1 there are points at y = 1 and 3, at x = 3 at y = 2 and 4."""
    points = ((1.0, 1.0), (1.0, 3.0), (3.0, 2.0), (3.0, 4.0))
    table = Table(axes=("x", "y"), points=points, values=(1.0, 3.0, 2.0, 4.0), scale="linear")
    assert table.at(2.0, 2.5).value == pytest.approx(2.5)
    assert table.at(2.0, 2.5).basis == "interpolated"
    assert table.at(2.0, 3.5).basis == "extrapolated"


@pytest.mark.parametrize(
    ("law", "below", "above"),
    [("proportional", 2.0, 32.0), ("constant", 2.0, 8.0), ("slope", 1.0, 32.0)],
)
def test_laws_beyond_the_points(law: str, below: float, above: float) -> None:
    table = Table.line("x", [(2, 2.0), (8, 8.0)], beyond=law, spread=0.1)
    assert table.at(1).value == pytest.approx(below)
    assert table.at(32).value == pytest.approx(above)
    near, far = table.at(16), table.at(256)
    assert near.basis == far.basis == "extrapolated"
    assert far.high / far.value > near.high / near.value > 1.1


def test_refusing_and_mistakes() -> None:
    table = Table.line("x", [(2, 2.0)], beyond="refuse")
    assert table.at(2).value == 2
    with pytest.raises(ValueError, match="within the measured points"):
        table.at(3)
    with pytest.raises(ValueError, match="one number for each of x"):
        table.at(1, 2)
    for wrong in (
        {"points": ((1.0,), (1.0,)), "values": (1.0, 2.0)},
        {"points": ((0.0,),), "values": (1.0,)},
        {"points": ((1.0,),), "values": (math.nan,)},
        {"points": ((1.0, 2.0),), "values": (1.0,)},
        {"points": (), "values": ()},
        {"points": ((1.0,),), "values": (1.0,), "spread": -0.1},
    ):
        with pytest.raises(ValueError, match=r"points|values|spread"):
            Table(axes=("x",), **wrong)  # type: ignore[arg-type]


def test_round_trip() -> None:
    table = Table.line("x", [(2, 2.0), (8, 8.0)], scale="linear", spread=0.25, source="here")
    assert Table.from_dict(table.to_dict()) == table


def test_files_of_tables_are_whole_fresh_or_nothing(tmp_path: Path) -> None:
    file, made = tmp_path / "folder" / "one.json", {"a": Table.line("bytes", [(1, 2.0), (4, 5.0)])}
    assert read_tables(file) is None
    write_tables(file, made)
    assert read_tables(file, fresh_s=60.0) == made
    assert list(file.parent.iterdir()) == [file]
    os.utime(file, (0, 0))
    assert read_tables(file, fresh_s=60.0) is None
    assert read_tables(file) == made
    for damaged in ("{", "[1]", '{"a": 3}'):
        file.write_text(damaged)
        assert read_tables(file) is None
