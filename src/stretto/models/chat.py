"""Chat templates, which are programs from a model's file, rendered in a sandbox with a budget.

jinja2's immutable sandbox keeps a template from reaching attributes and changing values; the budget keeps
it from looping or growing without end: items of loops are steps of it, `~` is an addition, and no function, method or
filter is given a number or makes a text beyond bounds. What templates may use is what transformers gives them: loop
controls, `tojson`, `raise_exception`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stretto.core.errors import UserError

_TEMPLATE_CHARACTERS = 256 * 1024
_OUTPUT_CHARACTERS = 8 * 1024 * 1024
_STEPS = 200_000
_WIDENING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice"})
_NUMBER = 10_000
"""The greatest number that these are given."""
_REPLACED_CHARACTERS = 64 * 1024 * 1024
"""Longer than this no text may become by `replace`, whatever it replaces."""
_WIDE = re.compile(r"[%{][^}%]*?(?:\d{5,}|\*)")
_NESTED = re.compile(r"\{[^}]*\{")
"""Fields of a format whose width is large, or is not in the format itself."""


_CHARGED = " charged"  # no name of a template's own


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts what a template does: every call, look-up and item of a range or a loop is a step of the budget."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.steps = 0
        self.globals.update(range=self._range, raise_exception=_raise, strftime_now=_strftime_now)
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _to_json, _CHARGED: self._charged}

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _STEPS:
            raise SecurityError(f"the template takes more than {_STEPS} steps")

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers

    def _charged(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        bound = getattr(obj, "__wrapped__", obj)  # the sandbox has a format method of its own
        _check_bounds(getattr(bound, "__self__", None), getattr(bound, "__name__", ""), [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.spend(1)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.spend(1)
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend(1)
        if operator == "**" or (operator == "*" and not all(isinstance(v, int | float) for v in (left, right))):
            raise SecurityError(f"the template uses {operator} on {type(left).__name__}")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("the template formats a field that is too wide")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list) and len(result) > _OUTPUT_CHARACTERS:
            raise SecurityError(f"the template makes a value longer than {_OUTPUT_CHARACTERS}")
        return result


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, file: str, variables: Mapping[str, Any]
) -> str:
    """The prompt a template makes of `messages`.

    Args:
        template: jinja2 source, as it stands in the model's file.
        messages: mappings with "role" and "content".
        file: what to name in errors.
        variables: more names the template sees, such as bos_token and add_generation_prompt.

    Raises:
        UserError: the template is broken, refuses the messages or exceeds its budget.
    """
    try:
        return "".join(_pieces(template, messages, variables))
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise UserError(
            f"its chat template failed: {error}", file=file, right="send messages with a role and a content"
        ) from None


def _pieces(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[str]:
    if len(template) > _TEMPLATE_CHARACTERS:
        raise SecurityError(f"the template is longer than {_TEMPLATE_CHARACTERS} characters")
    sandbox = _Sandbox()
    compiled = sandbox.from_string(_parsed(template))
    pieces, size = [], 0
    for piece in compiled.generate(messages=list(messages), **variables):
        sandbox.spend(1)
        size += len(piece)
        if size > _OUTPUT_CHARACTERS:
            raise SecurityError(f"the template writes more than {_OUTPUT_CHARACTERS} characters")
        pieces.append(piece)
    return pieces


@functools.lru_cache(maxsize=8)
def _parsed(template: str) -> nodes.Template:
    """The template with what the sandbox does not see made of what it does."""
    tree = _Sandbox().parse(template)
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, _CHARGED)
    _spell_out(tree)
    return tree


def _spell_out(node: nodes.Node) -> None:
    """Make additions of texts of all that is joined by `~` below a node."""
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _sum(value))
        elif isinstance(value, list):
            value[:] = [_sum(each) if isinstance(each, nodes.Node) else each for each in value]


def _sum(node: nodes.Node) -> nodes.Node:
    _spell_out(node)
    if not isinstance(node, nodes.Concat):
        return node
    texts = [_filtered(each, "string") for each in node.nodes]
    total: nodes.Node = functools.reduce(
        lambda a, b: nodes.Add(a, b, lineno=node.lineno, environment=node.environment), texts
    )
    return total


def _filtered(value: Any, name: str) -> Any:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno, environment=value.environment)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is given no large number and makes no large text of small ones."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        while given and not isinstance(given[0], str | list):  # what jinja2 itself puts before the value
            del given[0]
        name = function.__name__.removeprefix("do_")
        _check_bounds(given[0] if given else None, name, [*given[1:], *kwargs.values()])
        return function(*args, **kwargs)

    return bounded


def _check_bounds(value: Any, name: str, given: Sequence[Any]) -> None:
    """`SecurityError` where a method of a text, or a filter, could make far more of `value` than there was."""
    if name in _WIDENING and any(isinstance(each, int) and abs(each) > _NUMBER for each in given):
        raise SecurityError(f"the template gives {name} a number above {_NUMBER}")
    if not isinstance(value, str):
        return
    fields = value.replace("{{", "").replace("}}", "")
    if name in ("format", "format_map") and (_WIDE.search(fields) or _NESTED.search(fields)):
        raise SecurityError("the template formats a field that is too wide")
    longest = max((len(each) for each in given if isinstance(each, str)), default=0)
    if name == "replace" and (len(value) + 1) * (longest + 1) > _REPLACED_CHARACTERS:
        raise SecurityError("the template replaces by a text that is too long")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
