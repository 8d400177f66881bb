"""A file of requests answered without a socket, in the format of OpenAI's batch files, by the server's own routes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from starlette.types import ASGIApp, Message

from stretto.core.errors import UserError
from stretto.serve.http.app import create_app
from stretto.serve.http.service import Service
from stretto.serve.http.settings import ServerSettings
from stretto.serve.settings import load

_AGAIN_S = 0.1
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One request of a batch file: its number in the file from 1, its name, where it goes, and its body as JSON."""

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How a batch went."""

    answered: int
    refused: int


def read_batch(path: Path) -> list[Line]:
    """The requests in a batch file.

    Raises:
        UserError: naming the line that is wrong.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(_lines(file, str(path)))
    except FileNotFoundError:
        raise UserError("there is no such file", file=str(path), right="name a .jsonl file that exists") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the file cannot be read: {problem}", file=str(path), right="a UTF-8 text file") from None
    seen: dict[str, int] = {}
    for line in lines:
        first = seen.setdefault(line.custom_id, line.number)
        if first != line.number:
            raise UserError(f"{line.custom_id!r} is also on line {first}", file=str(path), line=line.number)
    return lines


def _lines(file: TextIO, name: str) -> Iterator[Line]:
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
            known = isinstance(found, dict) and found["method"] == "POST" and found["url"] in URLS
            if not known or not isinstance(found["custom_id"], str) or not isinstance(found["body"], dict):
                raise ValueError("a field is wrong")
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise UserError(
                f"this is no request: {problem!r}",
                file=name,
                line=number,
                right=f'write {{"custom_id", "method": "POST", "url", "body"}} with a url of {", ".join(URLS)}',
            ) from None
        body = {**found["body"], "stream": False}
        yield Line(number=number, custom_id=found["custom_id"], url=found["url"], body=json.dumps(body).encode())


def run_batch(
    settings: ServerSettings, lines: list[Line], output: Path, *, progress: Callable[[int], None] = lambda done: None
) -> Counts:
    """Answer `lines` and write one line of `output` for each as it is done; their order is that of the answers' ends.

    Raises:
        UserError: if the model cannot be loaded, before anything is written, or the file cannot be written.
    """
    service = Service(load(settings.engine), settings)
    try:
        with output.open("w", encoding="utf-8") as file:
            return asyncio.run(_answer_all(service, lines, file, progress))
    except OSError as problem:
        raise _unwritable(output, problem) from None
    except ExceptionGroup as problems:
        failed, _ = problems.split(OSError)
        if failed is None:
            raise
        raise _unwritable(output, failed.exceptions[0]) from None


def _unwritable(output: Path, problem: Exception) -> UserError:
    return UserError(f"the file cannot be written: {getattr(problem, 'strerror', problem)}", file=str(output))


async def _answer_all(service: Service, lines: list[Line], file: TextIO, progress: Callable[[int], None]) -> Counts:
    app = create_app(service)
    room = asyncio.Semaphore(max(1, min(2 * service.settings.engine.slots, service.settings.max_queue)))
    statuses: list[int] = []

    async def answer(line: Line) -> None:
        async with room:
            status, headers, body = await _post(app, line.url, line.body)
            while status == 429:  # its own answers fill the queue: a line may ask for many
                await asyncio.sleep(_AGAIN_S)
                status, headers, body = await _post(app, line.url, line.body)
        response = {"status_code": status, "request_id": headers[b"x-request-id"].decode(), "body": json.loads(body)}
        found = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": response}
        file.write(json.dumps({**found, "error": None}) + "\n")
        file.flush()
        statuses.append(status)
        progress(len(statuses))

    service.start()
    try:
        async with asyncio.TaskGroup() as group:
            for line in lines:
                group.create_task(answer(line))
    finally:
        await service.stop()
    answered = statuses.count(200)
    return Counts(answered=answered, refused=len(statuses) - answered)


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, Mapping[bytes, bytes], bytes]:
    """The status, the headers and the body of what a route answers."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
    }
    unread = [body]
    sent: list[Any] = []

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    pieces = [message["body"] for message in sent if message["type"] == "http.response.body"]
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(pieces)
