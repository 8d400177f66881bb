"""Tools of MCP servers as they are, and a compiler offered as such a server, by the protocol's official SDK (`mcp`)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from stretto.core.errors import UserError
from stretto.core.graph import PaidError
from stretto.workflow.compiler import Compiler
from stretto.workflow.tool import Parameter, Tool

if TYPE_CHECKING:
    from mcp import Client
    from mcp.server import MCPServer
    from mcp.types import CallToolResult
    from mcp.types import Tool as McpTool

_TYPES: Mapping[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": None,
}
MOST_PAGES = 100
MOST_DESCRIPTION_CHARACTERS = 500


@asynccontextmanager
async def mcp_tools(server: Any, **options: Any) -> AsyncIterator[list[Tool]]:
    """The tools of an MCP server, for as long as the context lasts.

    Args:
        server: its URL, `mcp.StdioServerParameters` of its command, or an `MCPServer` of this process.
        options: fields that all of the tools get, as `timeout_s` or `pure`.
    """
    async with _sdk().Client(server) as client:
        tools, cursor = list[Tool](), None
        for _ in range(MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools += [_tool(client, one, options) for one in page.tools]
            cursor = page.next_cursor
            if cursor is None:
                break
        yield tools


def mcp_server(
    compiler: Compiler, *, name: str = "stretto", description: str = "Answers a question."
) -> MCPServer[Any]:
    """An MCP server with one tool, `answer(question)`; its own `run("stdio")` or `run("streamable-http")` serves."""
    _sdk()
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    async def answer(question: str) -> str:
        found = await compiler.arun(question)
        if found.text is None:
            raise ToolError(str(found))
        return found.text

    server: MCPServer[Any] = MCPServer(name)
    server.add_tool(answer, description=description)
    return server


def _sdk() -> Any:
    try:
        import mcp
    except ImportError:
        raise UserError("the MCP SDK is not installed", right="pip install 'stretto[workflow]'") from None
    return mcp


def _tool(client: Client, one: McpTool, options: Mapping[str, Any]) -> Tool:
    parameters = _parameters(one.input_schema)

    async def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((parameter.name for parameter in parameters), args, strict=False))
        return _value(one.name, await client.call_tool(one.name, {**given, **kwargs}))

    description = " ".join((one.description or "").split())[:MOST_DESCRIPTION_CHARACTERS]
    name = re.sub(r"\W", "_", one.name)
    reads = bool(getattr(one.annotations, "read_only_hint", False))
    return Tool(name=name, description=description, function=call, parameters=parameters, **{"pure": reads, **options})


def _parameters(schema: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """What a tool takes, those it must be given first."""
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    found = []
    for name, one in sorted(properties.items(), key=lambda item: item[0] not in required):
        annotation = _TYPES.get(one["type"], Any) if isinstance(one.get("type"), str) else Any
        default = {} if name in required else {"default": one.get("default")}
        found.append(Parameter(name=name, annotation=annotation, **default))
    return tuple(found)


def _value(name: str, result: CallToolResult) -> Any:
    """The structured content if there is any, else the texts."""
    texts = [block.text for block in result.content if block.type == "text"]
    if result.is_error:
        raise PaidError(f"{name}: {' '.join(texts) or 'failed'}")
    structured = result.structured_content
    if isinstance(structured, dict) and structured.keys() == {"result"}:
        return structured["result"]
    return structured if structured is not None else "\n".join(texts)
