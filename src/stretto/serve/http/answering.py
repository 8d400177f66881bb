"""Waiting for answers on behalf of a client that may go away: whole, or as a stream of events.

When a client disconnects, its requests are cancelled at once, and their pages are free at the next step boundary.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from stretto.serve.handle import Handle
from stretto.serve.http.errors import ApiError
from stretto.serve.http.logprobs import Entries
from stretto.serve.http.replies import Reply
from stretto.serve.http.service import Service
from stretto.serve.request import Answer

T = TypeVar("T")

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def problem_of(answers: Sequence[Answer]) -> ApiError | None:
    """The error that a client is told if one of its answers did not come to its end."""
    reasons = {answer.reason for answer in answers}
    if "failed" in reasons:
        return ApiError(500, "the engine could not compute this answer; try again", code="engine_failed")
    if "deadline" in reasons:
        return ApiError(504, "the answer was not done within its timeout", code="deadline_exceeded")
    if "grammar" in reasons:
        return ApiError(400, "the grammar of this answer became too complex to follow", code="grammar_too_complex")
    if "cancelled" in reasons:
        return ApiError(503, "this server shut down before the answer was done", code="draining", retry_after_s=1)
    return None


class Whole(Response):
    """Sends all answers in one JSON body when the last of them is done."""

    def __init__(self, service: Service, handles: Sequence[Handle], reply: Reply) -> None:
        super().__init__()
        self._service = service
        self._handles = handles
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answers = await _unless_gone(receive, _all_of(self._handles))
        finally:
            self._service.cancel(self._handles)
        problem = problem_of(answers)
        if problem is not None:
            raise problem
        await JSONResponse(self._reply.whole(answers))(scope, receive, send)


class Stream(Response):
    """Sends pieces of the answers as server-sent events while they come."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, handles: Sequence[Handle], reply: Reply) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._service = service
        self._handles = handles
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send_all(send))
        finally:
            self._service.cancel(self._handles)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[str, None]:
        reply = self._reply
        for text in reply.first():
            yield text
        async with aclosing(_merged(self._handles)) as pieces:
            async for index, piece in pieces:
                if piece is not None:
                    events = reply.piece(index, piece.text, piece.entries)
                else:
                    answer = self._handles[index].result()
                    problem = problem_of([answer])
                    if problem is not None:
                        for text in reply.failed(problem):
                            yield text
                        return
                    events = reply.ended(index, answer)
                for text in events:
                    yield text
        for text in reply.last([handle.result() for handle in self._handles]):
            yield text


async def _all_of(handles: Sequence[Handle]) -> list[Answer]:
    return [await handle.answer() for handle in handles]


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    entries: Entries


async def _merged(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, _Piece | None], None]:
    """(index, piece) of all answers as they come, and (index, None) when one ends."""
    queue: asyncio.Queue[tuple[int, _Piece | None]] = asyncio.Queue()

    async def pump(index: int, handle: Handle) -> None:
        given = 0
        async for text in handle:
            entries = handle.logprobs_between(given, given + len(text))
            queue.put_nowait((index, _Piece(text, entries)))
            given += len(text)
        queue.put_nowait((index, None))

    pumps = [asyncio.create_task(pump(index, handle)) for index, handle in enumerate(handles)]
    try:
        left = len(handles)
        while left:
            index, piece = await queue.get()
            left -= piece is None
            yield index, piece
    finally:
        for task in pumps:
            task.cancel()


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, unless the client goes away before.

    Raises:
        ClientDisconnect: it did; `work` is cancelled.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([working, listening], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
