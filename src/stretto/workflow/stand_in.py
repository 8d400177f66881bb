"""A stand-in for a language model's server: OpenAI's streamed chat protocol on localhost, texts from a function.

For tests, benchmarks and demonstrations over real HTTP: it waits as long as a model would for its first token and for
every token after it. Only what `Endpoint` sends is understood.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from stretto.workflow.simulated import Line

Reply = Callable[[dict[str, Any]], Sequence[Line]]
"""From a request's body to the lines of the answer."""

MOST_BODY_BYTES = 16 * 2**20


@asynccontextmanager
async def stand_in(reply: Reply, *, first_token_s: float = 0.0, token_s: float = 0.0) -> AsyncIterator[str]:
    """Serves until the context ends; gives the base URL for `llm`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            body = await _read(reader)
            if body is None:
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                await _answer(writer, body, reply(body))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(writer: asyncio.StreamWriter, body: dict[str, Any], lines: Sequence[Line]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(first_token_s)
        for line in lines:
            await asyncio.sleep(line.tokens * token_s)
            writer.write(_event({"choices": [{"index": 0, "delta": {"content": f"{line.text}\n"}}]}))
            await writer.drain()
        asked = sum(len(message["content"]) // 4 + 4 for message in body["messages"])
        usage = {"prompt_tokens": asked, "completion_tokens": sum(line.tokens for line in lines)}
        writer.write(_event({"choices": [], "usage": usage}))
        writer.write(b"data: [DONE]\n\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The body of a chat request; None for anything else."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *headers = head.split("\r\n")
    sizes = [line.partition(":")[2] for line in headers if line.lower().startswith("content-length:")]
    if not first.startswith("POST /v1/chat/completions ") or not sizes or not 0 < int(sizes[0]) <= MOST_BODY_BYTES:
        return None
    body = json.loads(await reader.readexactly(int(sizes[0])))
    return body if isinstance(body, dict) and isinstance(body.get("messages"), list) else None
