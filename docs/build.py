"""Write the pages that follow from the code: docs/systems.md and one page a capability in docs/capabilities.

They hold what does not depend on the machine: choices, techniques, systems, and claims as declared, not as computed.

Usage: python docs/build.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import stretto
from stretto import serve, train, workflow
from stretto.claims.registry import Claim, claims
from stretto.claims.systems import System, state, systems
from stretto.core.orders import ORDERS
from stretto.core.plan import Domain
from stretto.serve.joining import JOININGS

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = "Made by `make docs` from the code; edits here are lost."


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a page is made of.

    Attributes:
        name: the page's name.
        package: the room, of which it shows the plan and the published systems.
        policies: for a field of the plan, the classes or functions that its values name.
        techniques: two fields of the plan whose values are laid against each other.
        job, cluster: files of the job and the machines for which the domain is asked whether a pair can run.
    """

    name: str
    package: ModuleType
    policies: Mapping[str, Mapping[str, Any]]
    techniques: tuple[str, str] | None = None
    job: str = ""
    cluster: str = ""

    @property
    def domain(self) -> Domain:
        found: Domain = self.package.domain
        return found

    def values(self, field: str) -> tuple[str, ...]:
        """The values that a field of the plan may take, none if they are not a short list."""
        if field in self.policies:
            return tuple(self.policies[field])
        hint = typing.get_type_hints(self.domain.plan_type).get(field)
        return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


CAPABILITIES = (
    Capability(
        name="serving",
        package=serve,
        policies={"joining": JOININGS},
        techniques=("joining", "layout"),
        job="jobs/quickstart.yaml",
        cluster="clusters/8xa100.yaml",
    ),
    Capability(name="training", package=train, policies={"schedule": ORDERS}),
    Capability(name="workflows", package=workflow, policies={}),
)


def documents() -> dict[str, str]:
    """All generated pages: path below docs, text."""
    pages = {f"capabilities/{each.name}.md": capability_page(each) for each in CAPABILITIES}
    return {"systems.md": systems_page(), **pages}


def stale(pages: Mapping[str, str], folder: Path) -> list[str]:
    """The pages that are missing in `folder`, or say something else there."""
    return [name for name, text in pages.items() if not _says(folder / name, text)]


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def systems_page() -> str:
    """The table of all published systems."""
    claimed = {claim.system for claim in claims()}
    states = {system.name: state(system, claimed) for system in systems()}
    counts = Counter(states.values())
    rows = [
        (_linked(system, states[system.name]), system.title, system.publication, f"`{system.room}`")
        + (states[system.name], _code(system.turned_on_by))
        for system in systems()
    ]
    return _page(
        "# The published systems",
        GENERATED,
        f"{counts['here']} here, {counts['part']} in part, {counts['to come']} to come. `stretto systems` prints this "
        "list, `stretto claims NAME` the figures of a system.",
        _table(("system", "technique", "publication", "room", "state", "turned on by"), rows),
    )


def _linked(system: System, how: str) -> str:
    pages = {each.domain.name: each.name for each in CAPABILITIES}
    if how != "here" or system.room not in pages:
        return system.name
    return f"[{system.name}](capabilities/{pages[system.room]}.md#{system.name})"


def capability_page(capability: Capability) -> str:
    """The page of one capability."""
    return _page(
        f"# {capability.name.capitalize()}",
        GENERATED,
        _first_sentence(capability.package),
        "## The choices of a plan",
        _table(("field", "values", "meaning"), _choices(capability)),
        *_policies(capability),
        *_matrix(capability),
        *_published(capability),
        "## Benchmarks",
        _table(("file", "what it compares"), _benchmarks(capability.domain.name)),
    )


def _choices(capability: Capability) -> Iterable[tuple[str, str, str]]:
    plan = capability.domain.plan_type
    meanings = _attributes(plan)
    hints = typing.get_type_hints(plan)
    for field in dataclasses.fields(plan):
        values = ", ".join(map(_code, capability.values(field.name))) or _TYPES.get(
            hints[field.name], str(hints[field.name])
        )
        default = "" if field.default is dataclasses.MISSING else f" ({_code(field.default)} unless said otherwise)"
        yield _code(field.name), values + default, meanings[field.name]


_TYPES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    int | None: "a whole number",
    tuple[str, ...]: "texts",
    tuple[int, ...]: "whole numbers",
}


def _attributes(kind: type) -> dict[str, str]:
    """The lines of the section "Attributes" of a docstring, by name."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _policies(capability: Capability) -> Iterable[str]:
    for field, policies in capability.policies.items():
        rows = [
            (_code(name), _first_paragraph(policy), _first_paragraph(sys.modules[policy.__module__]))
            for name, policy in policies.items()
        ]
        yield f"## Values of `{field}`"
        yield _table(("value", "rule", "idea"), rows)


def _matrix(capability: Capability) -> Iterable[str]:
    """Whether each two values of the techniques run together, asked of the domain itself; nothing without both."""
    if capability.techniques is None:
        return
    down, across = capability.techniques
    heads = capability.values(across)
    if not (capability.values(down) and heads):
        return
    job = stretto.load(ROOT / capability.job)
    cluster = stretto.load_cluster(ROOT / capability.cluster)
    domain = capability.domain
    able = [plan for plan in domain.candidates(job, cluster) if domain.check(job, plan, cluster) is None]
    best = max if domain.higher_is_better(job) else min
    base = best(able, key=lambda plan: domain.bound(job, plan, cluster))
    rows = [
        (_code(value), *(_pair(domain, job, base, cluster, {down: value, across: head}) for head in heads))
        for value in capability.values(down)
    ]
    yield f"## `{down}` with `{across}`"
    yield f"What the planner says for `{capability.job}` on `{capability.cluster}`: together, or why not."
    yield _table((f"`{down}`", *map(_code, heads)), rows)


def _pair(domain: Domain, job: Any, base: Any, cluster: Any, pair: Mapping[str, str]) -> str:
    try:
        refusal = domain.check(job, dataclasses.replace(base, **pair), cluster)
    except ValueError as problem:
        return str(problem)
    return "together" if refusal is None else refusal.reason


def _published(capability: Capability) -> Iterable[str]:
    declared = claims()
    claimed = {claim.system for claim in declared}
    present = [s for s in systems() if s.room == capability.domain.name and state(s, claimed) != "to come"]
    yield "## Published systems behind it"
    if not present:
        yield "None yet."
    for system in present:
        yield f"### {system.name}"
        yield f"*{system.publication}*: {system.what}."
        yield f"In {', '.join(map(_code, system.modules))}; turned on by {_code(system.turned_on_by) or 'nothing yet'}."
        yield from _declared([claim for claim in declared if claim.system == system.name], system.name)


def _declared(declared: Sequence[Claim], system: str) -> Iterable[str]:
    if not declared:
        yield "It has no claims yet."
        return
    yield _table(
        ("claim", "published", "kind", "setting"),
        [(each.says, _stated(each), each.kind, each.setting) for each in declared],
    )
    sources = dict.fromkeys(f"- {name}: {source}" for each in declared for name, source in _sources(each))
    if sources:
        yield "The constants that enter them:"
        yield "\n".join(sources)
    yield f"`stretto claims {system}` computes these figures and prints them beside the published ones."


def _stated(claim: Claim) -> str:
    figure = "" if claim.published is None else f"{claim.published:g} {claim.unit}".rstrip()
    return f"{figure} (doubtful)".lstrip() if claim.doubtful else figure


def _sources(claim: Claim) -> Iterable[tuple[str, str]]:
    yield from claim.constants.items()
    if claim.fitted_on:
        yield "fitted on", claim.fitted_on


def _benchmarks(room: str) -> Iterable[tuple[str, str]]:
    """The benchmarks that import the room, each with the first sentence of its docstring."""
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        doc = ast.get_docstring(tree)
        if doc and any(f"{module}.".startswith(f"stretto.{room}.") for module in imported):
            yield _code(f"benchmarks/{path.name}"), _first_sentence(doc)


def _first_paragraph(documented: object) -> str:
    """Of a docstring, or of whatever has one, on one line."""
    doc = documented if isinstance(documented, str) else inspect.getdoc(documented) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def _first_sentence(documented: object) -> str:
    return f"{_first_paragraph(documented).partition('. ')[0].rstrip('.')}."


def _code(value: object) -> str:
    return f"`{value}`" if value != "" else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _page(*blocks: str) -> str:
    return "\n\n".join(blocks) + "\n"


def main() -> int:
    """Write the pages, or with --check name those that are stale and return 1 if there are any."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check = parser.parse_args().check
    pages = documents()
    old = stale(pages, DOCS)
    for name in old:
        if not check:
            (DOCS / name).parent.mkdir(exist_ok=True)
            (DOCS / name).write_text(pages[name], encoding="utf-8")
        sys.stdout.write(f"docs/{name} {'is stale: run `make docs`' if check else 'written'}\n")
    return 1 if check and old else 0


if __name__ == "__main__":
    raise SystemExit(main())
