"""Stretto: describe the work and the machines; it finds the fastest way to run it in parallel, shows what
will happen before it runs, runs it, and shows what did happen.

    import stretto as st
    job = st.load("jobs/quickstart.yaml")
    ranking = st.plan(job, on=st.probe())
    trace = st.simulate(ranking.best)
    result = st.run(ranking.best)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stretto.core.errors import UserError
    from stretto.core.plan import Context, Plan, Prediction, Result
    from stretto.core.search import Ranking
    from stretto.core.trace import Trace
    from stretto.face import chosen_plan, plan, predict, probe, run, simulate, write_report
    from stretto.files import load, load_cluster, save_plan
    from stretto.serve.llm import LLM, Completion
    from stretto.serve.sampling import Sampling

_HOME = {
    **dict.fromkeys(["Context", "Plan", "Prediction", "Result"], "stretto.core.plan"),
    **dict.fromkeys(["chosen_plan", "plan", "predict", "probe", "run", "simulate", "write_report"], "stretto.face"),
    **dict.fromkeys(["load", "load_cluster", "save_plan"], "stretto.files"),
    **dict.fromkeys(["Completion", "LLM"], "stretto.serve.llm"),
    "Ranking": "stretto.core.search",
    "Sampling": "stretto.serve.sampling",
    "Trace": "stretto.core.trace",
    "UserError": "stretto.core.errors",
}

__all__ = [
    "LLM",
    "Completion",
    "Context",
    "Plan",
    "Prediction",
    "Ranking",
    "Result",
    "Sampling",
    "Trace",
    "UserError",
    "chosen_plan",
    "load",
    "load_cluster",
    "plan",
    "predict",
    "probe",
    "run",
    "save_plan",
    "simulate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Bring a public name from its room when it is first used, so that `import stretto` is quick and rooms
    stay apart.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'stretto' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
