"""Requests from files: our own columns, Azure's and its shortened form, APEX's and Mooncake's JSON lines.

Every format is known by its fields. Mooncake's tells what prompts share by a hash of each block of 512 tokens, which
stands for all before it too. Times are shifted so that the first request comes at 0. A mistake names the file,
the line and the field; sizes are bounded.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from stretto.core.errors import UserError
from stretto.serve.deploy.load import MAX_REQUESTS, MAX_TOKENS, Load

MAX_TRACE_BYTES = 512 * 2**20
MAX_LINE = 1 << 20
BLOCK_TOKENS = 512
"""Tokens of a block that Mooncake's traces hash."""


@dataclass(frozen=True, kw_only=True)
class TraceFormat:
    """One way to write requests down: the names of its fields, and how its times become seconds.

    Attributes:
        hashes: the field, which may be missing, with a hash of each block of a prompt.
    """

    name: str
    arrival: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]
    hashes: str = ""


def _number(scale: float) -> Callable[[Any], float]:
    return lambda value: float(value) * scale


def _date(value: Any) -> float:
    day = datetime.fromisoformat(str(value).strip())
    return (day if day.tzinfo else day.replace(tzinfo=UTC)).timestamp()


FORMATS = (
    TraceFormat(
        name="stretto", arrival="arrival_s", prompt="prompt_tokens", output="output_tokens", seconds=_number(1.0)
    ),
    TraceFormat(
        name="splitwise",
        arrival="arrived_at",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        seconds=_number(1.0),
    ),
    TraceFormat(name="azure", arrival="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens", seconds=_date),
    TraceFormat(
        name="apex",
        arrival="StartTimeOffset",
        prompt="ContextTokens",
        output="GeneratedTokens",
        seconds=_number(1e-9),
    ),
    TraceFormat(
        name="mooncake",
        arrival="timestamp",
        prompt="input_length",
        output="output_length",
        seconds=_number(1e-3),
        hashes="hash_ids",
    ),
)


def read_trace(path: str | Path, *, most: int | None = None) -> Load:
    """The requests of a file, in order of arrival.

    Args:
        most: take only so many of its first requests.

    Raises:
        UserError: if the file is missing, too large, of no known format or holds a value that cannot be, with the
            line.
    """
    file = str(path)
    try:
        if Path(path).stat().st_size > MAX_TRACE_BYTES:
            raise UserError("the trace is too large", file=file, right=f"at most {MAX_TRACE_BYTES} bytes are read")
        with open(path, encoding="utf-8", newline="") as opened:
            rows = _requests(opened, file, min(most or MAX_REQUESTS + 1, MAX_REQUESTS + 1))
    except FileNotFoundError:
        raise UserError("there is no such trace", file=file, right="name a .csv or .jsonl file that exists") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the trace cannot be read: {problem}", file=file, right="a UTF-8 text file") from None
    if not rows:
        raise UserError("the trace holds no request", file=file, right="at least one line")
    if len(rows) > MAX_REQUESTS:
        raise UserError("the trace is too long", file=file, right=f"at most {MAX_REQUESTS} requests")
    rows.sort(key=lambda row: row[0])
    arrival, prompt, output, hashes = zip(*rows, strict=True)
    return Load(
        np.array(arrival, np.float64) - arrival[0],
        np.array(prompt, np.int64),
        np.array(output, np.int64),
        hashes if any(hashes) else (),
        BLOCK_TOKENS,
    )


_Request = tuple[float, int, int, tuple[int, ...]]
"""(arrival, prompt tokens, output tokens, hashes of the prompt's blocks)."""


def _requests(opened: TextIO, file: str, most: int) -> list[_Request]:
    first = opened.read(1)
    opened.seek(0)
    lines = _json_lines(opened, file) if first == "{" else _csv_lines(opened, file)
    found: list[_Request] = []
    form: TraceFormat | None = None
    for line, fields in lines:
        form = form or _format_of(fields, file, line)
        found.append(_request(form, fields, file, line))
        if len(found) >= most:
            break
    return found


def _json_lines(opened: TextIO, file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(opened, start=1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text) if len(text) <= MAX_LINE else None
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise UserError("not a JSON object", file=file, line=line, right="one object a line")
        yield line, fields


def _csv_lines(opened: TextIO, file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(opened, restkey="more", strict=True)
    try:
        for row in reader:
            if "more" in row or None in row.values():
                raise UserError(
                    "the line has not as many fields as the first one", file=file, line=reader.line_num, right="as many"
                )
            yield reader.line_num, row
    except csv.Error as problem:
        raise UserError(
            f"not a CSV line: {problem}", file=file, line=reader.line_num, right="fields by commas"
        ) from None


def _format_of(fields: Mapping[str, Any], file: str, line: int) -> TraceFormat:
    for form in FORMATS:
        if {form.arrival, form.prompt, form.output} <= set(fields):
            return form
    known = "; ".join(f"{form.arrival}, {form.prompt}, {form.output}" for form in FORMATS)
    shown = ", ".join(str(name) for name in fields)[:80]
    raise UserError(f"the fields are {shown}", file=file, line=line, right=f"they must be among: {known}")


def _request(form: TraceFormat, fields: Mapping[str, Any], file: str, line: int) -> _Request:
    def wrong(field: str, right: str) -> UserError:
        shown = "missing" if field not in fields else repr(fields[field])[:60]
        return UserError(f"the value is {shown}", file=file, line=line, field=field, right=f"it must be {right}")

    try:
        arrival = form.seconds(fields[form.arrival])
        assert -1e12 < arrival < 1e12
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
        raise wrong(form.arrival, "a time") from None
    lengths = []
    for field in (form.prompt, form.output):
        try:
            length = float(fields[field])
            assert length == int(length)
            assert 1 <= length <= MAX_TOKENS
        except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
            raise wrong(field, f"a whole number of tokens in 1 .. {MAX_TOKENS}") from None
        lengths.append(int(length))
    hashes = fields.get(form.hashes, [])
    whole = isinstance(hashes, list) and all(isinstance(h, int) and not isinstance(h, bool) for h in hashes)
    if not whole or any(not 0 <= h < 2**63 for h in hashes):
        raise wrong(form.hashes, f"a list of whole numbers, one for each {BLOCK_TOKENS} tokens of the prompt")
    return arrival, lengths[0], lengths[1], tuple(hashes)
