"""Grammars that bind answers: JSON schemas, regular expressions, choices and context-free grammars, by llguidance.

llguidance (Moskal et al.) keeps an Earley parser over a lexer of regular-expression derivatives and walks the trie of
the vocabulary, which costs some 50 us a token whatever the grammar's size. Exact: an answer that ends by itself is in
the language of its grammar. An answer that is cut by its limit is a beginning of one. JSON comes on one line, so that
no answer spends its tokens on blanks.

What comes from outside is bounded before it is compiled: characters, depth, nested repetitions, seconds. The parser
recurses with the depth of a grammar, so that compiling wants a deep stack (`STACK_BYTES`).
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from stretto.core.errors import UserError
from stretto.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_SCHEMA_CHARACTERS = 65_536
MOST_GRAMMAR_CHARACTERS = 16_384
"""Longer chains of rules overflow the stack of llguidance's recursion: seen at twice as many."""
MOST_DEPTH = 48
"""Levels of a schema; llguidance reads 128 levels of JSON, and each of a schema takes two."""
MOST_REPEATS = 10_000
"""Product of repetitions within one another; at 1,000,000 a mask takes seconds."""
MOST_CHOICES = 1_000
MOST_SECONDS = 1.0
"""Longest time, of a core, for a grammar and its first mask: usual ones take a millisecond."""
MOST_MASK_SECONDS = 0.25
"""Longest time, of a core, for a later mask: whoever takes longer ends, so that the others are not held up again."""
STACK_BYTES = 64 * 2**20
_KEPT = 32
_LIMITS = {"initial_lexer_fuel": 1_000_000, "max_grammar_size": 100_000, "max_lexer_states": 10_000}
_LIMITS |= {"step_lexer_fuel": 50_000, "step_max_items": 20_000}
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}

Kind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarSource:
    """A grammar as it was asked for.

    Attributes:
        kind: of "json" the text is a JSON schema, of "choice" a JSON list of strings, of "regex" a regular expression
            in Rust's syntax, of "grammar" a context-free grammar in llguidance's variant of Lark's.
    """

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> GrammarSource:
        """A JSON schema, read or not."""
        return cls(kind="json", text=schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> GrammarSource:
        """One of some texts."""
        return cls(kind="choice", text=json.dumps(list(choices)))


JSON_OBJECT = GrammarSource.json_schema({"type": "object"})
"""Any JSON object."""


class Grammars:
    """Compiles grammars for one model, and keeps the last ones. Not for several threads at once.

    Args:
        tokenizer: of the model.
        vocabulary: length of its logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._kept: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """The grammar of `source`.

        Raises:
            UserError: it is too large, or none; or llguidance is not installed.
        """
        found = self._kept.pop(source, None) or self._compile(source)
        self._kept[source] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _compile(self, source: GrammarSource) -> CompiledGrammar:
        text = _bounded(source)
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise UserError(
                "constrained answers need llguidance, which is not installed",
                right="pip install 'stretto[constrained]'",
            ) from None
        trie = self._trie
        began = time.thread_time()  # of this thread alone: a busy machine makes no grammar complex
        try:
            if source.kind == "json":
                text = LLMatcher.grammar_from_json_schema(text, overrides=_JSON)  # type: ignore[arg-type]
            elif source.kind == "regex":
                text = LLMatcher.grammar_from_regex(text)
        except ValueError as problem:
            raise _refusal(str(problem)) from None
        limits = LLParserLimits(**_LIMITS, precompute_large_lexemes=False, verbose_errors=False)
        matcher = LLMatcher(trie, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        grammar = CompiledGrammar(matcher, self._ends, self._end)
        if matcher.is_error() or not any(grammar.first):
            raise _refusal(matcher.get_error() or "no text fits it")
        if time.thread_time() - began > MOST_SECONDS:
            raise UserError("is too complex to follow", right="repeat less, or nest less")
        return grammar

    @property
    def _ends(self) -> frozenset[int]:
        return self._tokenizer.eos_ids

    @property
    def _end(self) -> int:
        """The token that stands for all ends; where a model has none, one beyond its vocabulary."""
        return min(self._ends, default=self._vocabulary)

    @cached_property
    def _trie(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        words = _Words(self._tokenizer, self._vocabulary, self._end)
        return LLTokenizer(TokenizerWrapper(words), n_vocab=len(words.tokens))


class CompiledGrammar:
    """A `Grammar`; made by `Grammars.compile`.

    Attributes:
        first: the mask of the first token.
    """

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], end: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self._end = end
        self.first = mask_of(matcher, ends, end)

    def start(self) -> Following:
        return Following(self._matcher.deep_copy(), self.first, self._ends, self._end)


class Following:
    """A `Constraint`: one answer on its way through a grammar."""

    def __init__(self, matcher: LLMatcher, mask: bytes, ends: frozenset[int], end: int) -> None:
        self.mask = mask
        self._matcher = matcher
        self._ends = ends
        self._end = end

    def accept(self, token: int) -> str | None:
        if not self._matcher.consume_token(self._end if token in self._ends else token):
            return "grammar"
        if self._matcher.is_stopped():
            return "grammar" if self._matcher.is_error() else "stop"
        began = time.thread_time()
        self.mask = mask_of(self._matcher, self._ends, self._end)
        late = time.thread_time() - began > MOST_MASK_SECONDS
        return "grammar" if late or self._matcher.is_error() or not any(self.mask) else None


def mask_of(matcher: LLMatcher, ends: frozenset[int], end: int) -> bytes:
    """The tokens that may come next; where an answer may end, all tokens that end one."""
    mask = bytearray(matcher.compute_bitmask())
    byte, bit = end // 8, 1 << end % 8
    if mask[byte] & bit:
        mask[byte] &= ~bit
        for token in ends:
            mask[token // 8] |= 1 << token % 8
    return bytes(mask)


class _Words:
    """A vocabulary as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.tokens = [tokenizer.token_bytes(token) for token in range(max(vocabulary, end + 1))]
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.eos_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)


def _refusal(why: str) -> UserError:
    first = why.strip().splitlines()
    return UserError(f"cannot be followed: {' '.join(first)[:300] if first else 'no reason given'}")


def _bounded(source: GrammarSource) -> str:
    """The text to compile, if it is within bounds."""
    most = MOST_SCHEMA_CHARACTERS if source.kind in ("json", "choice") else MOST_GRAMMAR_CHARACTERS
    if len(source.text) > most:
        raise UserError(f"has {len(source.text)} characters", right=f"at most {most} are read")
    if source.kind in ("regex", "grammar"):
        _check_repeats(source.text)
        return source.text
    try:
        value = json.loads(source.text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"is not valid JSON: {problem}") from None
    if source.kind == "choice":
        return _choices(value)
    if not isinstance(value, dict):
        raise UserError("is no JSON schema", right="an object")
    for depth, pattern in _walk(value, 0):
        if depth > MOST_DEPTH:
            raise UserError(f"is deeper than {MOST_DEPTH} levels")
        if pattern is not None:
            _check_repeats(pattern)
    return source.text


def _choices(value: Any) -> str:
    able = isinstance(value, list) and 1 <= len(value) <= MOST_CHOICES
    if not able or not all(isinstance(text, str) and text for text in value):
        raise UserError("is no list of choices", right=f"1 to {MOST_CHOICES} texts that are not empty")
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)


def _walk(value: Any, depth: int) -> Iterator[tuple[int, str | None]]:
    """The depth of everything in a schema, with the patterns it names."""
    yield depth, None
    if depth > MOST_DEPTH:
        return
    if isinstance(value, dict):
        for name, part in value.items():
            if name == "pattern" and isinstance(part, str):
                yield depth, part
            if name == "patternProperties" and isinstance(part, dict):
                yield from ((depth, pattern) for pattern in part)
            yield from _walk(part, depth + 1)
    elif isinstance(value, list):
        for part in value:
            yield from _walk(part, depth + 1)


_MOST_DIGITS = 9
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|[()]|.", re.DOTALL)


def _check_repeats(pattern: str) -> None:
    if nested_repeats(pattern) > MOST_REPEATS:
        raise UserError("repeats too much", right=f"at most {MOST_REPEATS} times, nested repetitions multiplied")


def nested_repeats(pattern: str) -> int:
    """The largest product of bounded repetitions within one another in a regular expression.

    >>> nested_repeats("(a{3}b{5}){10,20}c{7}")
    100
    """
    groups, last = [1], 1
    for piece in _PIECE.finditer(pattern):
        text = piece.group()
        if text == "(":
            groups.append(1)
            last = 1
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] = max(groups[-1], last)
        elif piece.group(1):
            digits = piece.group(2) or piece.group(1)
            last *= max(1, int(digits)) if len(digits) <= _MOST_DIGITS else MOST_REPEATS + 1
            groups[-1] = max(groups[-1], last)
        else:
            last = 1
    return max(groups)
