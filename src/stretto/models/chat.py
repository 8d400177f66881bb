"""Chat templates, which are programs from a model's file, rendered in a sandbox with a budget.

jinja2's immutable sandbox keeps a template from reaching attributes and changing values; the budget keeps
it from looping or growing without end. What templates may use is what transformers gives them: loop
controls, `tojson`, `raise_exception`.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stretto.core.errors import UserError

_TEMPLATE_CHARACTERS = 256 * 1024
_OUTPUT_CHARACTERS = 8 * 1024 * 1024
_STEPS = 200_000


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts what a template does: every call, look-up and item of a range is a step of the budget."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.steps = 0
        self.globals.update(range=self._range, raise_exception=_raise, strftime_now=_strftime_now)
        self.filters["tojson"] = _to_json

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _STEPS:
            raise SecurityError(f"the template takes more than {_STEPS} steps")

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        return super().call(*args, **kwargs)

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
    return _Sandbox().parse(template)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
