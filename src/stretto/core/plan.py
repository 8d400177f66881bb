"""What a domain is, what a plan is, and what is known about a plan before it runs.

A domain (serving, training, ...) knows its jobs, the choices that can be made for one, why a choice is
impossible, what it would cost, and how to carry it out. Domains are found through the entry-point group
`stretto.domains`, so that a package of somebody else's can add one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from stretto.core.errors import UserError
from stretto.core.statistics import Interval
from stretto.core.trace import Comparison, Trace

SCHEMA_VERSION = 1

J = TypeVar("J")
C = TypeVar("C")


class Machines(Protocol):
    """All that the core knows of a cluster."""

    @property
    def name(self) -> str:
        """What people call it."""

    def fingerprint(self) -> str:
        """A short hash of everything that changes a prediction."""


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[J, C]):
    """How a job is carried out on a cluster: every choice made, as data.

    Attributes:
        kind: the domain's name.
        job: what is to be done.
        choices: the domain's own plan type.
        cluster: the machines it was made for.
    """

    kind: str
    job: J
    choices: C
    cluster: Any


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a choice is impossible, and the nearest change that would make it possible."""

    reason: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.nearest}" if self.nearest else self.reason


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a prediction.

    Attributes:
        unit: e.g. "s", "tokens/s", "bytes".
        higher_is_better: the direction in which people want it to go.
    """

    value: Interval
    unit: str
    higher_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is known of a plan before it runs.

    Attributes:
        metrics: by name, in the order in which people read them.
        bottleneck: one sentence: what the critical path is made of.
        assumed: one sentence: what had to be assumed, e.g. lengths of answers.
        phases: seconds of the critical path by phase.
        trace: the simulated run; left out where many plans are compared.
        table: what people may want to read besides, line by line, under a heading.
    """

    metrics: Mapping[str, Metric]
    bottleneck: str
    assumed: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    trace: Trace | None = None
    table: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave: the job's outputs, what happened, and the prediction beside it.

    Attributes:
        outputs: the domain's own records, plain values.
        said: what people read of them: (heading, text) pairs, either of which may be empty.
        measured: what happened.
        predicted: the same run simulated with what came out (lengths), on the same keys.
        forecast: what was said before the run, with its assumptions.
        comparison: predicted beside measured, by phase.
        interrupted: whether it was stopped early; outputs hold what was done.
        remarks: what a reader of the comparison should know, a sentence each.
        files: reports written, by kind.
    """

    plan: Plan[Any, Any]
    outputs: tuple[Mapping[str, Any], ...]
    said: tuple[tuple[str, str], ...] = ()
    measured: Trace
    predicted: Trace
    forecast: Prediction
    comparison: Comparison
    interrupted: bool = False
    remarks: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


Progress = Callable[[str, float, float], None]
"""`progress(what, done, total)`; total 0 means unknown. What follows a colon in `what` may change from call to call."""


def no_progress(what: str, done: float, total: float) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a run may know of the world around it.

    Attributes:
        progress: called with (what, done, total).
        cancelled: asked between steps; true means end cleanly with what is done.
        output: a folder for the event log and the like; None writes nothing.
        seed: of everything random in the run.
        rank, world: this process among the processes of the run.
    """

    progress: Progress = no_progress
    cancelled: Callable[[], bool] = lambda: False
    output: Path | None = None
    seed: int = 0
    rank: int = 0
    world: int = 1


class Domain(Protocol):
    """One kind of work. All but `run` are pure: the same arguments, the same answer, in any process."""

    name: str
    job_type: type
    plan_type: type

    def candidates(self, job: Any, cluster: Any) -> Iterable[Any]:
        """Every choice worth weighing, impossible ones included (so that their reason can be told)."""

    def check(self, job: Any, choices: Any, cluster: Any) -> Refusal | None:
        """None if it can run, else why not and what would."""

    def objective(self, job: Any) -> str:
        """The name of the metric by which plans are ranked."""

    def higher_is_better(self, job: Any) -> bool:
        """Whether the objective is to be made large."""

    def bound(self, job: Any, choices: Any, cluster: Any) -> float:
        """An optimistic value of the objective, cheap to compute; never worse than `simulate` would say."""

    def simulate(self, job: Any, choices: Any, cluster: Any) -> Prediction:
        """Play the choices on a virtual clock."""

    def prepare(self, job: Any, cluster: Any, progress: Progress) -> Any:
        """The cluster with what the domain must have measured on it first; the same cluster if nothing is missing."""

    def run(self, plan: Plan[Any, Any], ctx: Context) -> Result:
        """Carry the plan out."""


def domains() -> dict[str, Domain]:
    """All installed domains by name."""
    found: dict[str, Domain] = {}
    for point in entry_points(group="stretto.domains"):
        found[point.name] = point.load()
    return found


def domain_of(kind: str) -> Domain:
    """The domain named `kind`.

    Raises:
        UserError: if there is none, naming those there are.
    """
    found = domains()
    if kind not in found:
        choices = ", ".join(sorted(found)) or "none is installed: run `pip install .`"
        raise UserError(f"kind is {kind!r}", field="kind", right=f"it must be one of: {choices}")
    return found[kind]
