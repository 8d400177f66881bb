"""Tools: Python functions with a name, a description, typed parameters and terms under which they are called."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from stretto.core.clock import Clock
from stretto.core.errors import FieldError, require
from stretto.core.graph import Terms
from stretto.core.threads import on_executor, on_thread, plainly
from stretto.workflow.literals import Reference, Value, filled, text_of

JOIN = "join"
_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter: `default` is `inspect.Parameter.empty` where it must be given; `many` takes all that is left."""

    name: str
    annotation: Any = Any
    default: Any = _REQUIRED
    many: bool = False

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED and not self.many

    def __str__(self) -> str:
        shown = f"*{self.name}" if self.many else self.name
        if self.annotation is not Any:
            shown += f": {_annotation_text(self.annotation)}"
        return shown if self.default is _REQUIRED else f"{shown} = {self.default!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """Something a plan can call.

    Attributes:
        name: as plans call it.
        description: what it does, for the planner.
        function: plain or async; called with the arguments.
        parameters: what it takes.
        returns: the annotation of its result.
        executor: where a plain function runs: a thread of its own for each call if left out.
        price: what a call costs, in units of the budget; a call that returns `Paid` may cost less.
        terms: time-out, attempts, and what it does when a call before it failed.
        limit: most calls at once; None: no limit.
        pure: equal arguments give equal results, so that a call is not made twice in one run.
        keyed: its first parameter is an idempotency key that plans do not see; see `Terms`.
    """

    name: str
    description: str
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    returns: Any = Any
    executor: Executor | None = None
    price: float = 0.0
    timeout_s: float | None = None
    attempts: int = 1
    backoff_s: float = 0.1
    limit: int | None = None
    pure: bool = True
    keyed: bool = False
    on_error: Literal["skip", "feed"] = "skip"
    terms: Terms = field(init=False)

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == JOIN:
            raise FieldError("name", self.name, "a Python name other than join")
        require(0 <= self.price <= 1e9, "price", self.price, "in 0 .. 1e9")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1, or left out")
        terms = Terms(
            kind=self.name,
            pools=("tools",),
            timeout_s=self.timeout_s,
            attempts=self.attempts,
            backoff_s=self.backoff_s,
            on_error=self.on_error,
            bound=self.price,
            keyed=self.keyed,
        )
        object.__setattr__(self, "terms", terms)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, so that a decorated function still is one."""
        return self.function(*args, **kwargs)

    @property
    def signature(self) -> str:
        """As a planner reads it: `search(query: str, most: int = 3) -> str`."""
        returns = "" if self.returns is Any else f" -> {_annotation_text(self.returns)}"
        return f"{self.name}({', '.join(map(str, self.parameters))}){returns}"

    def bind(
        self, args: Sequence[Value], kwargs: Mapping[str, Value], results: Mapping[int, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with results in place of references, checked against the annotations.

        A reference that stands for a whole `str` parameter arrives as the result's text.

        Raises:
            TypeError: for arguments that the tool does not take.
        """
        many = next((p for p in self.parameters if p.many), None)
        named = {p.name: p for p in self.parameters if not p.many}
        order = list(named.values())
        if len(args) > len(order) and many is None:
            raise TypeError(f"{self.name} takes {len(order)} arguments, {len(args)} are given")
        taken = [_fit(order[i] if i < len(order) else many, arg, results) for i, arg in enumerate(args)]
        given = {parameter.name for parameter in order[: len(args)]}
        keywords = {}
        for name, value in kwargs.items():
            if name not in named:
                raise TypeError(f"{self.name} has no parameter {name}; it takes {', '.join(named) or 'none'}")
            if name in given:
                raise TypeError(f"{self.name} is given {name} twice")
            keywords[name] = _fit(named[name], value, results)
        missing = [p.name for p in order if p.required and p.name not in given | keywords.keys()]
        if missing:
            raise TypeError(f"{self.name} needs {', '.join(missing)}")
        return taken, keywords

    async def call(self, clock: Clock, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function where it runs: async ones in the loop, plain ones on the executor or a thread of their own.

        On virtual time a plain function without an executor is called in place: it takes no time. What gives something
        to be awaited is async, whatever stands around it.
        """
        if inspect.iscoroutinefunction(self.function):
            return await self.function(*args, **kwargs)
        if self.executor is not None:
            return await on_executor(self.executor, _run_by_name, *_by_name(self.function), args, kwargs)
        if clock.is_virtual:
            value = plainly(self.function, *args, **kwargs)
        else:
            value = await on_thread(self.function, *args, **kwargs)
        return await value if inspect.isawaitable(value) else value


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(**options: Any) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a function a tool, bare (`@tool`) or with fields of `Tool` (`@tool(price=0.002, timeout_s=5)`).

    Name, description and parameters come from the function; a decorated function can still be called.
    """

    def make(function: Callable[..., Any]) -> Tool:
        parameters, returns = _parameters(function)
        named: dict[str, Any] = {
            "name": function.__name__,
            "description": inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0].replace("\n", " "),
            "parameters": parameters[1:] if options.get("keyed") else parameters,
            "returns": returns,
        }
        return Tool(function=function, **{**named, **options})

    return make if function is None else make(function)


def tools_by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Tools by name.

    Raises:
        FieldError: for two of one name, or for what is not a tool.
    """
    found: dict[str, Tool] = {}
    for one in tools:
        require(isinstance(one, Tool), "tools", one, "tools; put @tool above the function")
        require(one.name not in found, "tools", one.name, "tools of different names")
        found[one.name] = one
    return found


def _parameters(function: Callable[..., Any]) -> tuple[tuple[Parameter, ...], Any]:
    hints = typing.get_type_hints(function)
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            raise FieldError("function", function.__name__, "a function with named parameters, without **")
        found.append(
            Parameter(
                name=parameter.name,
                annotation=hints.get(parameter.name, Any),
                default=parameter.default,
                many=parameter.kind is parameter.VAR_POSITIONAL,
            )
        )
    return tuple(found), hints.get("return", Any)


def _fit(parameter: Parameter | None, value: Value, results: Mapping[int, Any]) -> Any:
    assert parameter is not None
    found = filled(value, results)
    annotation = parameter.annotation
    if isinstance(value, Reference) and annotation is str:
        return text_of(found)
    if not accepts(annotation, found):
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise TypeError(f"{parameter.name} is {shown}; it must be {_annotation_text(annotation)}")
    return found


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` is what `annotation` says; what is not understood accepts everything."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if annotation is None or annotation is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(accepts(one, value) for one in arguments)
    if origin is Literal:
        return value in arguments
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, Sequence):
        return isinstance(value, (list, tuple)) and all(accepts(arguments[0], item) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            accepts(arguments[0], key) and accepts(arguments[1], item) for key, item in value.items()
        )
    if annotation is list:
        return isinstance(value, (list, tuple))
    return isinstance(value, annotation) if isinstance(annotation, type) and origin is None else True


def _annotation_text(annotation: Any) -> str:
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _by_name(function: Callable[..., Any]) -> tuple[str, str, Callable[..., Any] | None]:
    """How a worker finds the function: by module and name, under which the tool stands; itself where there is none."""
    module, name = function.__module__, function.__qualname__
    found = _lookup(module, name) if module in sys.modules else None
    named = found is function or (isinstance(found, Tool) and found.function is function)
    return module, name, None if named else function


def _lookup(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _run_by_name(
    module: str, name: str, function: Callable[..., Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    found = function or _lookup(module, name)
    return found(*args, **kwargs)
