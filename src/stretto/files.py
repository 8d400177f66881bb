"""Files into values and back: the only place that knows pydantic, and the only definition of how a mistake in
a file is told.

A value has one definition, its frozen dataclass. A YAML file is parsed into plain data with the line of every
field, validated against the dataclass (extra fields forbidden, no silent conversions), and each mistake
becomes one line: file, line, field, value, what would be right.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from stretto.core.errors import FieldError, UserError
from stretto.core.plan import SCHEMA_VERSION, Plan, domain_of, domains
from stretto.hardware.cluster import Cluster

T = TypeVar("T")
Path_ = tuple[str | int, ...]

MAX_FILE_BYTES = 32 * 2**20
MAX_NODES = 2_000_000


@dataclass(frozen=True)
class Document:
    """Plain data from a YAML file, with the line (from 1) of each field."""

    file: str
    data: Any
    lines: Mapping[Path_, int]

    def line(self, path: Path_) -> int | None:
        """The line of a field, or of the nearest field around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def error(self, path: Path_, problem: str, right: str | None = None) -> UserError:
        field = ".".join(str(part) for part in path) or None
        return UserError(problem, file=self.file, line=self.line(path), field=field, right=right)


def read_yaml(path: str | Path) -> Document:
    """Parse a YAML file.

    Raises:
        UserError: if it is missing, too large, not UTF-8, not YAML, uses anchors, or names a field twice.
    """
    file = str(path)
    try:
        size = os.stat(path).st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"the file has {size} bytes", file=file, right=f"at most {MAX_FILE_BYTES} are read")
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("there is no such file", file=file, right="name a .yaml file that exists") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the file cannot be read: {problem}", file=file, right="a UTF-8 text file") from None
    return parse_yaml(text, file)


def parse_yaml(text: str, file: str) -> Document:
    """Parse YAML text; `file` is the name used in errors."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise UserError("not valid YAML: it nests too deep", file=file, right="fewer brackets") from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None) or getattr(problem, "context_mark", None)
        what = getattr(problem, "problem", None) or str(problem)
        raise UserError(
            f"not valid YAML: {what}",
            file=file,
            line=mark.line + 1 if mark else None,
            right="check indentation and quotes",
        ) from None
    if root is None:
        raise UserError("the file is empty", file=file, right="it must hold a job, a plan or a cluster")
    lines: dict[Path_, int] = {}
    builder = _Builder(file, lines)
    return Document(file, builder.value(root, ()), lines)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 of PyYAML, but for numbers with an exponent, which need neither a point nor a sign, as in JSON."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)


class _Builder:
    """Turns YAML nodes into plain data, noting lines and refusing what could grow without bound."""

    def __init__(self, file: str, lines: dict[Path_, int]) -> None:
        self._file = file
        self._lines = lines
        self._seen: set[int] = set()
        self._scalars = _Loader("")

    def value(self, node: yaml.Node, path: Path_) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        if id(node) in self._seen:
            raise UserError("anchors and aliases are not used here", file=self._file, line=line, right="write it out")
        self._seen.add(id(node))
        if len(self._seen) > MAX_NODES:
            raise UserError(f"more than {MAX_NODES} entries", file=self._file, line=line, right="split the file")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError) as problem:
            raise UserError(f"not a plain value: {problem}", file=self._file, line=line) from None

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in result:
                raise UserError(f"{key} stands here twice", file=self._file, line=line, right="keep one of the two")
            self._lines[(*path, key)] = line
            result[key] = self.value(value_node, (*path, key))
        return result


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _forbid_extra_fields(kind)
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def _forbid_extra_fields(kind: Any) -> None:
    """Tell pydantic, for a dataclass and all dataclasses within it, to refuse fields that it does not know."""
    for inner in typing.get_args(kind):
        _forbid_extra_fields(inner)
    if not dataclasses.is_dataclass(kind) or "__pydantic_config__" in vars(kind):
        return
    settings: Any = kind
    settings.__pydantic_config__ = {"extra": "forbid", "strict": True}
    for hint in typing.get_type_hints(kind).values():
        _forbid_extra_fields(hint)


def validate(kind: type[T], document: Document, data: Any, path: Path_ = ()) -> T:
    """Make a value of `kind` of the plain `data` that stands at `path` of `document`.

    Raises:
        UserError: for the first mistake, with its place.
    """
    try:
        found: T = _adapter(kind).validate_json(json.dumps(data, default=str))
        return found
    except ValidationError as problem:
        raise _first_mistake(problem, kind, document, data, path) from None


def _first_mistake(problem: ValidationError, kind: Any, document: Document, data: Any, path: Path_) -> UserError:
    """The first mistake; of a value that may be of several kinds, the one that was found furthest inside it.

    A field that is not known goes before one that is missing beside it, which it may be, misspelt.
    """
    errors = [(error, (*path, *_place(error, data))) for error in problem.errors()]
    error, place = errors[0]
    inside = [each for each in errors if each[1][: len(place)] == place]
    error, place = max(inside, key=lambda each: len(each[1]))
    if error["type"] == "missing":
        beside = (each for each in errors if each[0]["type"] in _UNKNOWN and each[1][:-1] == place[:-1])
        error, place = next(beside, (error, place))
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        field: Path_ = (*place, *(int(p) if p.isdigit() else p for p in cause.field.split(".")))
        return document.error(field, f"the value is {_shown(cause.value)}", f"it must be {cause.right}")
    if isinstance(cause, Exception):
        return document.error(place, str(cause))
    if error["type"] == "missing":
        return document.error(place, "this field is missing", "add it")
    if error["type"] in _UNKNOWN:
        known = ", ".join(_fields_at(kind, place[len(path) : -1]))
        return document.error(place, "there is no such field", f"known here: {known}" if known else "remove it")
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return document.error(place, f"the value is {_shown(error.get('input'))}", f"it must be {message}")


def _place(error: Any, data: Any) -> Iterator[str | int]:
    """Where an error is in `data`: its fields, without what pydantic says between them of kinds and functions."""
    for part in error["loc"]:
        of_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if of_list or (isinstance(data, dict) and part in data):
            data = data[part]
        elif error["type"] != "missing" or part is not error["loc"][-1]:
            continue
        yield part


def _fields_at(kind: Any, place: Path_) -> Iterator[str]:
    """The fields that a dataclass has at `place` inside a value of `kind`; of all kinds that it may have there."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not place:
            yield from (field.name for field in dataclasses.fields(kind) if field.init)
        elif place[0] in hints:
            yield from _fields_at(hints[str(place[0])], place[1:])
        return
    holds = typing.get_origin(kind) in (tuple, list, Sequence, Mapping, dict)
    for inner in typing.get_args(kind):
        if not holds:
            yield from _fields_at(inner, place)
        elif place:
            yield from _fields_at(inner, place[1:])


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load(path: str | Path) -> Any:
    """Read a job or a plan, whichever the file holds.

    Returns:
        A job of the domain that its `kind` names, or a `Plan` whose `cluster` is the fingerprint it was made for.
    """
    document = read_yaml(path)
    data = _mapping(document)
    return _plan(document, data) if "choices" in data else _job(document, data, ())


def load_job(path: str | Path) -> Any:
    """Read a job file."""
    document = read_yaml(path)
    return _job(document, _mapping(document), ())


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file."""
    document = read_yaml(path)
    data = _mapping(document)
    try:
        return cluster_from(document, data)
    except FieldError as problem:
        field: Path_ = tuple(int(p) if p.isdigit() else p for p in problem.field.split("."))
        raise document.error(field, f"the value is {_shown(problem.value)}", f"it must be {problem.right}") from None
    except UserError as problem:
        raise problem.at(file=document.file) from None
    except ValueError as problem:
        raise document.error((), str(problem)) from None


def cluster_from(document: Document, data: Any) -> Cluster:
    return validate(Cluster, document, data)


def save_plan(plan: Plan[Any, Any], path: str | Path) -> None:
    """Write a plan file: schema version, job, choices, and the fingerprint of the machines it was made for."""
    write_text(path, yaml.safe_dump(plan_data(plan), sort_keys=False, allow_unicode=True, width=100))


def plan_data(plan: Plan[Any, Any]) -> dict[str, Any]:
    """What a plan file holds, as plain values."""
    return {
        "stretto": SCHEMA_VERSION,
        "kind": plan.kind,
        "cluster": {"name": plan.cluster.name, "fingerprint": plan.cluster.fingerprint()},
        "choices": _plain(plan.choices),
        "job": _plain(plan.job),
    }


def cluster_text(cluster: Cluster) -> str:
    """A cluster file."""
    return yaml.safe_dump(cluster.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def check_place(path: str | Path) -> None:
    """`UserError` where `write_text` could not write: asked before the work that the file is for."""
    target = Path(path)
    folder = target.absolute().parent
    if target.exists() and not target.is_file() and not target.is_dir():
        return  # a pipe, a terminal
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if target.is_dir() else f"{folder} is no folder that may be written"
        raise UserError(f"the file cannot be written: {why}", file=str(path), right="name a file in one that may be")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all; into what is there and no file (a pipe, a terminal) straight.

    Raises:
        UserError: if its folder is missing or may not be written.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise UserError(
            f"the file cannot be written: {problem.strerror or problem}",
            file=str(path),
            right="name a folder that may be written",
        ) from None


def _plain(value: Any) -> Any:
    return json.loads(_adapter(type(value)).dump_json(value, exclude_none=True))


def _mapping(document: Document) -> dict[str, Any]:
    if not isinstance(document.data, dict):
        raise document.error(
            (),
            f"the file holds a {type(document.data).__name__}",
            "it must hold fields: `kind: serve` and so on",
        )
    return document.data


def _job(document: Document, data: dict[str, Any], path: Path_) -> Any:
    if "kind" not in data:
        raise document.error((*path, "kind"), "this field is missing", f"one of: {', '.join(sorted(domains()))}")
    try:
        domain = domain_of(str(data["kind"]))
    except UserError as problem:
        raise problem.at(file=document.file, line=document.line((*path, "kind")), field="kind") from None
    return validate(domain.job_type, document, data, path)


def _plan(document: Document, data: dict[str, Any]) -> Plan[Any, Any]:
    if data.get("stretto") != SCHEMA_VERSION:
        raise document.error(
            ("stretto",),
            f"the plan's schema version is {data.get('stretto')!r}",
            f"this stretto reads version {SCHEMA_VERSION}",
        )
    unknown = set(data) - {"stretto", "kind", "cluster", "choices", "job"}
    if unknown:
        raise document.error(
            (min(unknown),), "there is no such field", "a plan has stretto, kind, cluster, choices, job"
        )
    job_data, cluster = data.get("job"), data.get("cluster")
    if not isinstance(job_data, dict):
        raise document.error(("job",), "the job is missing or is not a mapping", "a plan file holds its job")
    if not isinstance(cluster, dict) or not isinstance(cluster.get("fingerprint"), str):
        raise document.error(("cluster", "fingerprint"), "this field is missing", "the fingerprint of the machines")
    job = _job(document, job_data, ("job",))
    domain = domain_of(job.kind)
    choices: Any = validate(domain.plan_type, document, data["choices"], ("choices",))
    return Plan(kind=job.kind, job=job, choices=choices, cluster=SavedCluster(**_names(cluster)))


def _names(cluster: dict[str, Any]) -> dict[str, str]:
    return {"name": str(cluster.get("name", "?")), "saved_fingerprint": str(cluster["fingerprint"])}


@dataclass(frozen=True)
class SavedCluster:
    """All that a plan file says of the machines it was made for."""

    name: str
    saved_fingerprint: str

    def fingerprint(self) -> str:
        return self.saved_fingerprint


def check_fingerprint(plan: Plan[Any, Any], cluster: Cluster, *, recheck: bool, file: str) -> None:
    """Refuse a plan that was made for other machines, unless it is to be rechecked.

    Raises:
        UserError: naming both machines.
    """
    made_for, here = plan.cluster.fingerprint(), cluster.fingerprint()
    if made_for != here and not recheck:
        raise UserError(
            f"the plan was made for {plan.cluster.name} ({made_for}), this is {cluster.name} ({here})",
            file=file,
            field="cluster.fingerprint",
            right="plan anew, or pass --recheck to try it here" + _there(plan),
        )


def _there(plan: Plan[Any, Any]) -> str:
    return "; `stretto plan --emit` prints what starts it there" if plan.kind == "deployment" else ""


def bind(plan: Plan[Any, Any], cluster: Cluster, *, file: str) -> Plan[Any, Any]:
    """The plan of a file on the machines at hand.

    Raises:
        UserError: if it cannot run on them.
    """
    refusal = domain_of(plan.kind).check(plan.job, plan.choices, cluster)
    if refusal is not None:
        raise UserError(
            f"the plan cannot run here: {refusal.reason}", file=file, field="choices", right=refusal.nearest
        )
    return dataclasses.replace(plan, cluster=cluster)
