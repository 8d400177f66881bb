"""Workflows: plans of calls that run in parallel while they are written, inside a budget and a deadline.

from stretto import workflow as wf

@wf.tool
async def search(query: str) -> str: ...

planner = wf.llm("http://localhost:8000/v1", model="smollm2-135m-instruct")
print(wf.Compiler(planner=planner, tools=[search]).run("Which is higher, ...?"))
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from stretto.core.durable import DurableLog
from stretto.core.graph import Failure, Graph, Paid, PaidError, Terms, on_executor
from stretto.workflow.compiler import Answer, Compiler, execute
from stretto.workflow.domain import WorkflowDomain
from stretto.workflow.job import Source, Step, WorkflowJob
from stretto.workflow.joiner import Verdict, last_result, parse_verdict
from stretto.workflow.llm import Endpoint, EndpointError, llm
from stretto.workflow.mcp import mcp_server, mcp_tools
from stretto.workflow.model import Called, Executed, Model, Prompt, Round, Scripted, Usage
from stretto.workflow.parse import ParsedPlan, PlannedTask, PlanParser, parse_plan
from stretto.workflow.prompts import plan_grammar
from stretto.workflow.react import ReAct
from stretto.workflow.run import run
from stretto.workflow.simulated import CallRow, Line, SimulatedModel, simulated_tool
from stretto.workflow.steps import Outcome
from stretto.workflow.tool import Tool, tool

domain = WorkflowDomain()

__all__ = [
    "Answer",
    "CallRow",
    "Called",
    "Compiler",
    "DurableLog",
    "Endpoint",
    "EndpointError",
    "Executed",
    "Failure",
    "Graph",
    "Line",
    "Model",
    "Outcome",
    "Paid",
    "PaidError",
    "ParsedPlan",
    "PlanParser",
    "PlannedTask",
    "Prompt",
    "ReAct",
    "Round",
    "Scripted",
    "SimulatedModel",
    "Source",
    "Step",
    "Terms",
    "Tool",
    "Usage",
    "Verdict",
    "WorkflowJob",
    "domain",
    "execute",
    "last_result",
    "llm",
    "load",
    "mcp_server",
    "mcp_tools",
    "on_executor",
    "parse_plan",
    "parse_verdict",
    "plan_grammar",
    "run",
    "simulated_tool",
    "tool",
]


def __getattr__(name: str) -> Any:
    """`wf.load` is the package's own `load`, which stands above the rooms."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("stretto.files").load
