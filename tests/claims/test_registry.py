"""What each kind of claim asks, what each verdict means, and that a claim never sees the published figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stretto.claims import registry
from stretto.claims.registry import NULL_AS_GOOD, Figure, Row, claim, run_claims

from .fake import fake_claims


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The claims of the product are set aside; those that a test declares are forgotten after it."""
    registry.claims()
    monkeypatch.setattr(registry, "_declared", {})


def declare(figure: Figure | Any = None, **options: Any) -> None:
    """Declare a claim that returns `figure`."""

    def some_figure(quick: bool) -> Figure:
        return figure  # type: ignore[no-any-return]

    claim(**{"system": "flover", "says": "it is fast", "kind": "measured", "published": 8.0, **options})(some_figure)


def judged(ours: Any, null: float | None = None, note: str = "", **options: Any) -> Row:
    declare(Figure(ours=ours, null=null, note=note), **options)
    (row,) = run_claims()
    return row


SIMULATED = {"kind": "simulated", "tolerance": 0.25, "constants": {"bandwidth": "a data sheet"}}


@pytest.mark.parametrize(
    ("ours", "published", "verdict"),
    [(8, 8, "held"), (8.0000001, 8, "missed"), (7, 8, "missed"), (0, 0, "held"), (-3, -3, "held")],
)
def test_an_exact_claim_is_equal_or_missed(ours: float, published: float, verdict: str) -> None:
    assert judged(ours, kind="exact", published=published).verdict == verdict


@pytest.mark.parametrize(("ours", "verdict"), [(True, "held"), (False, "missed"), (1.0, "failed"), (1, "failed")])
def test_a_fact_without_a_figure_is_true_or_missed(ours: float, verdict: str) -> None:
    row = judged(ours, kind="exact", published=None)
    assert (row.verdict, row.ratio) == (verdict, None)


def test_a_figure_is_not_compared_with_true() -> None:
    row = judged(True, kind="exact", published=1.0)
    assert (row.verdict, row.ours) == ("failed", None)


@pytest.mark.parametrize(("ours", "verdict"), [(6.0, "held"), (5.99, "missed"), (8.0, "held"), (800.0, "held")])
def test_a_measured_claim_may_be_better_and_a_little_worse(ours: float, verdict: str) -> None:
    assert judged(ours, tolerance=0.25).verdict == verdict


@pytest.mark.parametrize(("ours", "verdict"), [(10.0, "held"), (10.01, "missed"), (8.0, "held"), (0.1, "held")])
def test_a_measured_claim_may_be_lower_where_lower_is_better(ours: float, verdict: str) -> None:
    assert judged(ours, tolerance=0.25, lower_is_better=True).verdict == verdict


@pytest.mark.parametrize(
    ("ours", "verdict"), [(6.0, "held"), (5.99, "missed"), (10.0, "held"), (10.01, "missed"), (8.0, "held")]
)
def test_a_simulated_claim_is_near_on_both_sides(ours: float, verdict: str) -> None:
    assert judged(ours, null=1.0, **SIMULATED).verdict == verdict


@pytest.mark.parametrize(
    ("ours", "null", "verdict"), [(9.0, 9.5, "held"), (9.0, 9.0, "missed"), (9.0, 7.0, "missed"), (9.0, 8.5, "missed")]
)
def test_a_simulated_claim_beats_its_null_model(ours: float, null: float, verdict: str) -> None:
    row = judged(ours, null=null, note="small", **SIMULATED)
    assert row.verdict == verdict
    assert row.note == ("small" if verdict == "held" else f"small; {NULL_AS_GOOD}")


def test_only_simulated_claims_must_beat_the_null_model() -> None:
    row = judged(8.0, null=8.0)
    assert (row.verdict, row.null, row.note) == ("held", 8.0, "")


def test_a_simulated_claim_without_a_null_model_fails() -> None:
    row = judged(8.0, **SIMULATED)
    assert (row.verdict, row.holds) == ("failed", False)
    assert "null" in row.note


@pytest.mark.parametrize(("ours", "verdict", "holds"), [(8.5, "consistent", None), (20.0, "missed", False)])
def test_a_claim_fitted_on_the_table_is_consistent_at_best(ours: float, verdict: str, holds: bool | None) -> None:
    row = judged(ours, null=1.0, fitted_on="table 3", **SIMULATED)
    assert (row.verdict, row.holds, row.fitted_on) == (verdict, holds, "table 3")


@pytest.mark.parametrize("ours", [8.0, 800.0])
def test_a_doubtful_claim_is_reported_and_not_judged(ours: float) -> None:
    row = judged(ours, null=1.0, doubtful=True, **SIMULATED)
    assert (row.verdict, row.holds) == ("reported", None)


def test_a_row_holds_all_that_was_said_and_found() -> None:
    row = judged(6.0, null=1.0, unit="x", setting="one GPU", note="small", **SIMULATED)
    assert 0 <= row.seconds < 10
    assert row == Row(
        system="flover",
        name="some_figure",
        says="it is fast",
        kind="simulated",
        setting="one GPU",
        published=8.0,
        ours=6.0,
        ratio=0.75,
        null=1.0,
        verdict="held",
        constants={"bandwidth": "a data sheet"},
        fitted_on=None,
        seconds=row.seconds,
        holds=True,
        unit="x",
        note="small",
    )


def test_missed_does_not_hold_and_zero_has_no_ratio() -> None:
    row = judged(1.0, kind="exact", published=0.0)
    assert (row.holds, row.ratio) == (False, None)


def test_an_exception_is_a_row_and_the_others_still_run() -> None:
    @claim(system="flover", says="it breaks", kind="measured", published=2.0)
    def breaks(quick: bool) -> Figure:
        raise RuntimeError("out of\n  luck")

    declare(Figure(ours=8.0))
    broken, sound = run_claims()
    assert (broken.verdict, broken.holds, broken.note) == ("failed", False, "RuntimeError: out of luck")
    assert (broken.ours, broken.ratio, broken.null) == (None, None, None)
    assert sound.verdict == "held"


def test_what_is_no_figure_fails() -> None:
    declare(8.0)
    (row,) = run_claims()
    assert (row.verdict, row.ours) == ("failed", None)
    assert "Figure" in row.note


def test_ctrl_c_is_not_a_failed_claim() -> None:
    @claim(system="flover", says="it is stopped", kind="measured", published=2.0)
    def stopped(quick: bool) -> Figure:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_claims()


@pytest.mark.parametrize("quick", [False, True])
def test_a_claim_is_told_quick_and_nothing_else(quick: bool) -> None:
    told: list[object] = []

    @claim(system="flover", says="it is fast", kind="measured", published=8.0)
    def spy(quick: bool) -> Figure:
        told.append(quick)
        return Figure(ours=8.0)

    run_claims(quick=quick)
    assert told == [quick]
    assert type(told[0]) is bool


def test_the_function_stays_what_it_is() -> None:
    def plain(quick: bool) -> Figure:
        return Figure(ours=1.0 if quick else 2.0)

    assert claim(system="flover", says="it counts", kind="exact", published=2.0)(plain) is plain


def test_claims_of_one_system() -> None:
    declare(Figure(ours=8.0), system="nexus")
    declare(Figure(ours=8.0), system="flover")
    assert [row.system for row in run_claims()] == ["flover", "nexus"]
    assert [row.system for row in run_claims("nexus")] == ["nexus"]
    assert run_claims("tawa") == []


def test_progress_is_told_from_nothing_to_all() -> None:
    declare(Figure(ours=8.0), system="nexus")
    declare(Figure(ours=8.0), system="flover")
    seen: list[tuple[str, float, float]] = []
    run_claims(progress=lambda what, done, total: seen.append((what, done, total)))
    assert seen == [("claims", 0, 2), ("claims", 1, 2), ("claims", 2, 2)]


def test_a_second_claim_of_the_same_name_is_refused() -> None:
    declare()
    with pytest.raises(ValueError, match=r"flover\.some_figure.*once"):
        declare()
    declare(system="nexus")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"system": ""}, "system"),
        ({"says": ""}, "says"),
        ({"says": "two\nlines"}, "says.*one line"),
        ({"kind": "guessed"}, "kind.*exact, measured, simulated"),
        ({"published": float("nan")}, "published"),
        ({"published": True}, "published"),
        ({"published": "8"}, "published"),
        ({"published": None}, "published.*exact"),
        ({"published": 0.0}, "published.*exact"),
        ({"published": -8.0}, "published.*exact"),
        ({"constants": {"bandwidth": ""}}, "constants.*source"),
        ({"kind": "simulated", "tolerance": 0.25}, "constants"),
        ({**SIMULATED, "tolerance": 0.0}, "tolerance.*> 0"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"kind": "exact", "tolerance": 0.1}, "tolerance.*exact"),
        ({"fitted_on": ""}, "fitted_on"),
        ({**SIMULATED, "lower_is_better": True}, "lower_is_better.*measured"),
        ({"kind": "exact", "lower_is_better": True}, "lower_is_better.*measured"),
    ],
)
def test_a_bad_declaration_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        declare(**options)
    assert registry._declared == {}


def test_a_function_that_asks_for_more_than_quick_is_refused() -> None:
    def greedy(quick: bool, published: float) -> Figure:
        return Figure(ours=published)

    with pytest.raises(ValueError, match="quick"):
        claim(system="flover", says="it cheats", kind="measured", published=8.0)(greedy)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [{"ours": float("inf")}, {"ours": "8"}, {"ours": 8.0, "null": float("nan")}, {"ours": 8.0, "null": True}]
)
def test_a_figure_is_finite(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Figure(**values)


ONE = """
@claim(system="flover", says="it is there", kind="exact", published=None)
def is_there(quick):
    return Figure(ours=quick)
"""


@pytest.fixture
def one_module(tmp_path: Path) -> Iterator[None]:
    with fake_claims(tmp_path, ONE):
        yield


@pytest.mark.usefixtures("one_module")
def test_modules_of_the_room_are_found_and_imported_once() -> None:
    assert [row.name for row in run_claims()] == ["is_there"]
    assert [row.verdict for row in run_claims(quick=True)] == ["held"]


def test_a_bad_declaration_in_a_module_is_told(tmp_path: Path) -> None:
    with fake_claims(tmp_path, ONE + ONE), pytest.raises(ValueError, match="once"):
        registry.claims()


def test_modules_of_the_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(*, group: str) -> list[SimpleNamespace]:
        assert group == "stretto.claims"
        return [SimpleNamespace(load=lambda: declare(Figure(ours=8.0)))]

    monkeypatch.setattr(registry, "entry_points", points)
    assert [row.name for row in run_claims()] == ["some_figure"]
