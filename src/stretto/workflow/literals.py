"""Arguments of a planned call: literals and references to earlier results, read and filled in without evaluating.

The reader knows strings, numbers, `True`, `False`, `None` (and JSON's spellings), lists, tuples, dicts, and `$3` or
`${3}`: the result of task 3. A reference that is a whole value passes the result itself; one inside a string passes
its text. Inside a string `$3` counts only if a task 3 stands above and no money follows (`$3.50`); otherwise it is
text, as is `\\$3`. A result is put in once and never read again: a `$1` that it holds stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_DEPTH = 32
MOST_ITEMS = 10_000
MOST_RESULT_CHARACTERS = 4 * 2**20


class LiteralError(ValueError):
    """Text that is no literal, with the column (from 1) where it stops being one."""

    def __init__(self, problem: str, column: int) -> None:
        super().__init__(f"{problem} at column {column}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A whole value: the result of a task."""

    task: int


@dataclass(frozen=True, slots=True)
class Template:
    """A string with the texts of results in it: pieces of text and numbers of tasks in turn."""

    parts: tuple[str | int, ...]


Value = Any
"""None, bool, int, float, str, `Reference`, `Template`, or a list, tuple or dict of these."""

_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[^\W\d]\w*")
_NAMED = re.compile(r"([^\W\d]\w*)\s*=(?!=)")
_REFERENCE = re.compile(r"\$(?:\{(\d{1,9})\}|(\d{1,9})(?!\d))")
_IN_TEXT = re.compile(r"\\(.)|\$(?:\{(\d{1,9})\}|(\d{1,9})(?![\d]|[.,]\d))", re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", "'": "'", '"': '"', "/": "/", "b": "\b", "f": "\f"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class Reader:
    """Reads the arguments of one call.

    Args:
        text: what stands between the parentheses.
        known: whether a task of that number stands above.
    """

    def __init__(self, text: str, known: Callable[[int], bool]) -> None:
        self._text = text
        self._known = known
        self._at = 0
        self._items = 0

    def arguments(self) -> tuple[tuple[Value, ...], dict[str, Value]]:
        """Positional and named arguments.

        Raises:
            LiteralError: for anything that is not a literal.
        """
        positional: list[Value] = []
        named: dict[str, Value] = {}
        while self._peek():
            name = self._name()
            if name is None and named:
                raise self._error("a positional argument after a named one")
            if name in named:
                raise self._error(f"{name} is given twice")
            value = self._value(0)
            if name is None:
                positional.append(value)
            else:
                named[name] = value
            if self._peek() and not self._take(","):
                raise self._error("a comma is missing")
        return tuple(positional), named

    def _error(self, problem: str) -> LiteralError:
        return LiteralError(problem, self._at + 1)

    def _peek(self) -> str:
        text = self._text
        while self._at < len(text) and text[self._at].isspace():
            self._at += 1
        return text[self._at] if self._at < len(text) else ""

    def _take(self, what: str) -> bool:
        if self._peek() == what:
            self._at += 1
            return True
        return False

    def _name(self) -> str | None:
        """The name of a named argument, if one begins here."""
        self._peek()
        match = _NAMED.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match.group(1)

    def _value(self, depth: int) -> Value:
        self._items += 1
        if depth > MOST_DEPTH:
            raise self._error(f"more than {MOST_DEPTH} levels")
        if self._items > MOST_ITEMS:
            raise self._error(f"more than {MOST_ITEMS} values")
        first = self._peek()
        if first in ("'", '"'):
            return self._string(first)
        if first == "$":
            return self._reference()
        if first in ("[", "("):
            return self._sequence(first, depth)
        if first == "{":
            return self._dict(depth)
        match = _NUMBER.match(self._text, self._at)
        if match is not None:
            return self._number(match)
        word = _WORD.match(self._text, self._at)
        if word is not None and word.group() in _WORDS:
            self._at = word.end()
            return _WORDS[word.group()]
        raise self._error("not a literal" if first else "a value is missing")

    def _number(self, match: re.Match[str]) -> int | float:
        text = match.group()
        if len(text) > 400:
            raise self._error("a number of more than 400 digits")
        self._at = match.end()
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        raise self._error(f"{text[:40]} is no number")

    def _reference(self) -> Reference:
        match = _REFERENCE.match(self._text, self._at)
        if match is None:
            raise self._error("$ without the number of a task")
        task = int(match.group(1) or match.group(2))
        self._check(task)
        self._at = match.end()
        return Reference(task)

    def _check(self, task: int) -> None:
        if not self._known(task):
            raise self._error(f"${task} is not the result of a task above")

    def _sequence(self, opening: str, depth: int) -> Value:
        items: list[Value] = []
        self._at += 1
        comma = True
        while not self._take(_CLOSING[opening]):
            if not comma:
                raise self._error("a comma is missing")
            items.append(self._value(depth + 1))
            comma = self._take(",")
        if opening == "[":
            return items
        return items[0] if len(items) == 1 and not comma else tuple(items)

    def _dict(self, depth: int) -> dict[Value, Value]:
        items: dict[Value, Value] = {}
        self._at += 1
        comma = True
        while not self._take("}"):
            if not comma:
                raise self._error("a comma is missing")
            key = self._value(depth + 1)
            if not isinstance(key, (str, int, float)) and key is not None:
                raise self._error("a key must be a string or a number")
            if not self._take(":"):
                raise self._error("a colon is missing")
            items[key] = self._value(depth + 1)
            comma = self._take(",")
        return items

    def _string(self, quote: str) -> str | Template | Reference:
        text, begin = self._text, self._at + 1
        end = begin
        while end < len(text) and text[end] != quote:
            end += 2 if text[end] == "\\" else 1
        if end >= len(text):
            raise self._error("a string without its end")
        parts: list[str | int] = []
        at = begin
        for match in _IN_TEXT.finditer(text, begin, end):
            escaped, braced, bare = match.groups()
            if escaped == "$":
                parts += [self._unescaped(at, match.start()), "$"]
            elif braced or (bare and self._known(int(bare))):
                self._check(int(braced or bare))
                parts += [self._unescaped(at, match.start()), int(braced or bare)]
            else:
                continue
            at = match.end()
        parts.append(self._unescaped(at, end))
        self._at = end + 1
        return _joined(parts)

    def _unescaped(self, begin: int, end: int) -> str:
        text = self._text[begin:end]
        if "\\" not in text:
            return text
        text = _ESCAPE.sub(_escape, text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _SURROGATE.search(text) else text


_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    code = match.group(1) or match.group(2)
    if code is not None:
        return chr(int(code, 16))
    return _ESCAPES.get(match.group(3), match.group(0))


def _joined(parts: list[str | int]) -> str | Template | Reference:
    """Neighbouring pieces of text as one, empty ones left out."""
    merged: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    if len(merged) == 1 and isinstance(merged[0], int):
        return Reference(merged[0])
    if all(isinstance(part, str) for part in merged):
        return "".join(map(str, merged))
    return Template(tuple(merged))


def references(value: Value) -> set[int]:
    """The tasks whose results `value` asks for."""
    if isinstance(value, Reference):
        return {value.task}
    if isinstance(value, Template):
        return {part for part in value.parts if isinstance(part, int)}
    if isinstance(value, (list, tuple)):
        return set().union(*(references(item) for item in value))
    if isinstance(value, dict):
        return set().union(*(references(item) for item in value.values()))
    return set()


def filled(value: Value, results: Mapping[int, Any]) -> Any:
    """`value` with results in place of its references.

    Raises:
        ValueError: if a text would grow beyond four million characters.
    """
    if isinstance(value, Reference):
        return results[value.task]
    if isinstance(value, Template):
        texts = [part if isinstance(part, str) else text_of(results[part]) for part in value.parts]
        if sum(map(len, texts)) > MOST_RESULT_CHARACTERS:
            raise ValueError(f"an argument has more than {MOST_RESULT_CHARACTERS} characters; pass a shorter result")
        return "".join(texts)
    if isinstance(value, list):
        return [filled(item, results) for item in value]
    if isinstance(value, tuple):
        return tuple(filled(item, results) for item in value)
    if isinstance(value, dict):
        return {key: filled(item, results) for key, item in value.items()}
    return value


def text_of(result: Any) -> str:
    """A result as it stands in texts: strings as they are, the rest as JSON where it can be."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)
