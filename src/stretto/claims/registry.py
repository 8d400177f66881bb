"""Claims: what a publication states, computed anew by the code that is here and laid beside the published figure.

A claim is a function of `quick` alone, declared with `@claim`; it never sees the published figure, which is only
compared with what it returns. All modules of `stretto.claims` and of the entry-point group `stretto.claims` are
imported to find them, so they import at their top only what every installation has.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Real
from typing import Literal

from stretto.core.errors import require
from stretto.core.plan import Progress, no_progress

Kind = Literal["exact", "measured", "simulated"]
Verdict = Literal["held", "missed", "consistent", "reported", "failed"]

NULL_AS_GOOD = "the null model is as near to the published figure"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a claim's function found.

    Attributes:
        ours: the figure, in the claim's unit; True or False where the publication states a fact without a figure.
        null: what a constant, the data sheet or a closed form says instead; a simulated claim must have it.
        note: what a reader should know of this run, in one line.
    """

    ours: float
    null: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        sound = isinstance(self.ours, bool) or _is_number(self.ours)
        require(sound, "ours", self.ours, "a finite number, or True or False")
        require(self.null is None or _is_number(self.null), "null", self.null, "a finite number or None")


Compute = Callable[[bool], Figure]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published statement and the function that computes it here.

    Attributes:
        system: the published system, by its name in `systems.yaml`.
        name: the function's name.
        says: the statement, in one line.
        kind: "exact": ours must equal the published figure; "measured": run on this machine, and at most `tolerance`
            short of it; "simulated": played on named machines, and within `tolerance` on either side.
        compute: from `quick` (a smaller instance will do) to the figure.
        published: the published figure; None for a fact without one, where ours must be True.
        unit: of both figures.
        setting: the model, lengths and machine for which it was published.
        constants: where each constant that enters the figure is from.
        fitted_on: the published table that is compared, if constants were fitted on that very table.
        tolerance: share of the published figure by which ours may differ.
        doubtful: the published figure is uncertain: it is printed and not judged.
        lower_is_better: a measured figure may be anything below the published one.
    """

    system: str
    name: str
    says: str
    kind: Kind
    compute: Compute
    published: float | None
    unit: str = ""
    setting: str = ""
    constants: Mapping[str, str] = field(default_factory=dict)
    fitted_on: str | None = None
    tolerance: float = 0.0
    doubtful: bool = False
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        exact, published = self.kind == "exact", self.published
        kinds = typing.get_args(Kind)
        require(bool(self.system), "system", self.system, "the name of a published system")
        require(bool(self.says) and "\n" not in self.says, "says", self.says, "one line")
        require(self.kind in kinds, "kind", self.kind, f"one of {', '.join(kinds)}")
        right = "a finite number, or None for a fact without a figure"
        require(published is None or _is_number(published), "published", published, right)
        require(exact or (published is not None and published > 0), "published", published, "> 0 unless kind is exact")
        require(all(self.constants.values()), "constants", self.constants, "a source for each name")
        require(self.kind != "simulated" or bool(self.constants), "constants", {}, "named in a simulated claim")
        require(self.fitted_on != "", "fitted_on", self.fitted_on, "the name of a table, or None")
        require(0 <= self.tolerance < 1, "tolerance", self.tolerance, "in 0 .. 1, less than 1")
        require(not exact or self.tolerance == 0, "tolerance", self.tolerance, "0 in an exact claim")
        require(self.kind != "simulated" or self.tolerance > 0, "tolerance", self.tolerance, "> 0 in a simulated claim")
        right = "False unless kind is measured"
        require(self.kind == "measured" or not self.lower_is_better, "lower_is_better", self.lower_is_better, right)
        parameters = list(inspect.signature(self.compute).parameters)
        require(parameters == ["quick"], "parameters", parameters, "['quick']: a claim is told nothing else")

    def agrees(self, ours: float) -> bool:
        """Whether `ours` is as near to the published figure as this kind of claim asks."""
        if self.published is None:
            return ours is True
        if self.kind == "exact":
            return ours == self.published
        slack = self.tolerance * self.published
        if self.kind == "simulated":
            return abs(ours - self.published) <= slack
        return ours <= self.published + slack if self.lower_is_better else ours >= self.published - slack


@dataclass(frozen=True, kw_only=True)
class Row:
    """A claim after it was run.

    Attributes:
        system, name, says, kind, setting, published, unit, constants, fitted_on: as in `Claim`.
        ours, null: as in `Figure`; None if the claim failed.
        ratio: ours over published; None where either is missing or the published figure is 0.
        verdict: "held"; "missed"; "consistent": it agrees, but with constants fitted on the very table; "reported":
            too doubtful to be judged; "failed": its function raised or returned no valid figure.
        seconds: wall time of the function.
        holds: whether the verdict is "held"; None where nothing was judged ("consistent", "reported").
        note: what the function, the judge or the error said, in one line.
    """

    system: str
    name: str
    says: str
    kind: Kind
    setting: str
    published: float | None
    ours: float | None
    ratio: float | None
    null: float | None
    verdict: Verdict
    constants: Mapping[str, str]
    fitted_on: str | None
    seconds: float
    holds: bool | None
    unit: str
    note: str


_declared: dict[tuple[str, str], Claim] = {}


def claim(
    *,
    system: str,
    says: str,
    kind: Kind,
    published: float | None,
    unit: str = "",
    setting: str = "",
    constants: Mapping[str, str] | None = None,
    fitted_on: str | None = None,
    tolerance: float = 0.0,
    doubtful: bool = False,
    lower_is_better: bool = False,
) -> Callable[[Compute], Compute]:
    """Declare the decorated function as a claim; see `Claim` for the arguments. The function stays what it is.

    Raises:
        ValueError: if the declaration is not sound, or the system has a claim of that name.
    """

    def declare(compute: Compute) -> Compute:
        declared = Claim(
            system=system,
            name=compute.__name__,
            says=says,
            kind=kind,
            compute=compute,
            published=published,
            unit=unit,
            setting=setting,
            constants=dict(constants or {}),
            fitted_on=fitted_on,
            tolerance=tolerance,
            doubtful=doubtful,
            lower_is_better=lower_is_better,
        )
        key = (system, declared.name)
        require(key not in _declared, "claim", f"{system}.{declared.name}", "declared once")
        _declared[key] = declared
        return compute

    return declare


def claims(system: str | None = None) -> list[Claim]:
    """All claims, or those of one system, system by system in the order of their declaration."""
    for module in pkgutil.iter_modules(import_module("stretto.claims").__path__):
        import_module(f"stretto.claims.{module.name}")
    for point in entry_points(group="stretto.claims"):
        point.load()
    found = [each for each in _declared.values() if system in (None, each.system)]
    return sorted(found, key=lambda each: each.system)


def run_claims(system: str | None = None, *, quick: bool = False, progress: Progress = no_progress) -> list[Row]:
    """Compute and judge all claims, or those of one system.

    Args:
        system: a system's name; one without claims has no rows.
        quick: smaller instances, where a claim has them.
        progress: told after each claim.
    """
    chosen = claims(system)
    rows: list[Row] = []
    for each in chosen:
        progress("claims", len(rows), len(chosen))
        rows.append(_run(each, quick))
    progress("claims", len(rows), len(chosen))
    return rows


def _run(each: Claim, quick: bool) -> Row:
    start = time.perf_counter()
    try:
        figure = each.compute(quick)
        _check(each, figure)
    except Exception as problem:  # noqa: BLE001 (whatever a claim raises is its row's verdict)
        note = " ".join(f"{type(problem).__name__}: {problem}".split())
        return _row(each, None, "failed", note, time.perf_counter() - start)
    verdict, note = _judge(each, figure)
    return _row(each, figure, verdict, note, time.perf_counter() - start)


def _check(each: Claim, figure: Figure) -> None:
    require(isinstance(figure, Figure), "the claim's value", figure, "a Figure")
    right = "True or False, as the claim states no figure" if each.published is None else "a number"
    require(isinstance(figure.ours, bool) == (each.published is None), "ours", figure.ours, right)
    require(each.kind != "simulated" or figure.null is not None, "null", figure.null, "given by a simulated claim")


def _judge(each: Claim, figure: Figure) -> tuple[Verdict, str]:
    beaten = each.kind != "simulated" or _nearer(figure, each.published)
    note = figure.note if beaten else "; ".join(filter(None, (figure.note, NULL_AS_GOOD)))
    if each.doubtful:
        return "reported", note
    if not (beaten and each.agrees(figure.ours)):
        return "missed", note
    return "consistent" if each.fitted_on else "held", note


def _nearer(figure: Figure, published: float | None) -> bool:
    assert figure.null is not None
    assert published is not None
    return abs(figure.ours - published) < abs(figure.null - published)


def _row(each: Claim, figure: Figure | None, verdict: Verdict, note: str, seconds: float) -> Row:
    return Row(
        system=each.system,
        name=each.name,
        says=each.says,
        kind=each.kind,
        setting=each.setting,
        published=each.published,
        ours=figure.ours if figure else None,
        ratio=figure.ours / each.published if figure and each.published else None,
        null=figure.null if figure else None,
        verdict=verdict,
        constants=each.constants,
        fitted_on=each.fitted_on,
        seconds=seconds,
        holds={"held": True, "missed": False, "failed": False}.get(verdict),
        unit=each.unit,
        note=note,
    )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
