"""Tools of an MCP server in a process of its own and of one in this process; a compiler as a server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from stretto import workflow as wf

pytest.importorskip("mcp")
from mcp import Client, StdioServerParameters
from mcp.server import MCPServer

SERVER = """
from mcp.server import MCPServer
from mcp_types import ToolAnnotations
server = MCPServer("numbers")

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(x: int, y: int = 1) -> int:
    "Add two numbers."
    return x + y

@server.tool()
def fail(text: str) -> str:
    "Fail."
    raise ValueError(text)

server.run("stdio")
"""
PLAN = '1. add(1)\n2. add($1, y=40)\n3. add("a")\n4. fail("on purpose")\n5. join()'


async def outcomes(server: Any) -> list[Any]:
    async with wf.mcp_tools(server, timeout_s=20) as tools:
        assert [tool.signature for tool in tools] == ["add(x: int, y: int = 1)", "fail(text: str)"]
        assert tools[0].description == "Add two numbers."
        assert [tool.pure for tool in tools] == [True, False]
        plan = wf.parse_plan(PLAN, [tool.name for tool in tools])
        return [one.outcome for one in await wf.execute(plan, tools)]


def test_tools_of_a_server_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    server = StdioServerParameters(command=sys.executable, args=[str(tmp_path / "server.py")])
    found = asyncio.run(outcomes(server))
    assert found[:2] == [2, 42]
    assert "x is 'a'; it must be int" in str(found[2])
    assert "fail: " in str(found[3])


def test_a_compiler_as_a_server() -> None:
    @wf.tool
    async def look(what: str) -> str:
        """Look."""
        return f"{what} seen"

    async def main() -> list[Any]:
        good = wf.Compiler(planner=wf.Scripted(plans=['1. look("it")\n2. join()']), tools=[look], joiner=wf.last_result)
        bad = wf.Compiler(planner=wf.Scripted(), tools=[look])
        found = []
        for compiler in (good, bad):
            async with Client(wf.mcp_server(compiler)) as client:
                result = await client.call_tool("answer", {"question": "?"})
                found.append((result.is_error, result.content[0].text))  # type: ignore[union-attr]
        return found

    good, bad = asyncio.run(main())
    assert good == (False, "it seen")
    assert bad[0]
    assert "no answer: the planner" in bad[1]


def test_a_server_as_a_tool_of_a_compiler() -> None:
    """A compiler's server is a server like any other."""

    @wf.tool
    async def look(what: str) -> str:
        """Look."""
        return f"{what} seen"

    async def main() -> str | None:
        inner = wf.Compiler(
            planner=wf.Scripted(plans=['1. look("it")\n2. join()']), tools=[look], joiner=wf.last_result
        )
        server: MCPServer[Any] = wf.mcp_server(inner)
        async with wf.mcp_tools(server) as tools:
            planner = wf.Scripted(plans=['1. answer("what is seen?")\n2. join()'])
            return (await wf.Compiler(planner=planner, tools=tools, joiner=wf.last_result).arun("?")).text

    assert asyncio.run(main()) == "it seen"
