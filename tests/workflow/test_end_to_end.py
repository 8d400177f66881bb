"""The page's real tools (a file, a database, an HTTP service, work on processes) with SmolLM2 as the planner.

The planner is stretto's own server on this machine, held to the form of a plan by a grammar of the tools; beside it,
the page's own script. What a small model's plans are worth is recorded, not judged: that they are valid is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_examples import ROOT, blocks

pytestmark = pytest.mark.slow

SCRIPT = """
import json, re, sqlite3, sys, threading
from http.server import ThreadingHTTPServer

import example
from stretto import workflow as wf


def main():
    example.FOLDER.mkdir()
    for name, celsius in (("valley", (18.0, 20.0)), ("summit", (-2.0, 1.0))):
        (example.FOLDER / f"{name}.csv").write_text("celsius\\n" + "\\n".join(map(str, celsius)) + "\\n")
    with sqlite3.connect(example.FOLDER / "stations.db") as database:
        database.execute("CREATE TABLE stations (name TEXT, metres INTEGER)")
        database.executemany("INSERT INTO stations VALUES (?, ?)", [("valley", 480), ("summit", 2960)])
    service = ThreadingHTTPServer(("127.0.0.1", 0), example.Service)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    example.SERVICE = f"http://127.0.0.1:{service.server_port}"
    grammar = wf.plan_grammar({tool.name: tool for tool in example.TOOLS}, most_calls=4)
    small = wf.llm(sys.argv[1], "smollm2-135m-instruct", max_tokens=200, extra={"plan": {"guided_grammar": grammar}})
    found = []
    for what in ("altitude", "temperatures", "altitude and the temperatures"):
        for station in ("valley", "summit"):
            compiler = wf.Compiler(planner=small, tools=example.TOOLS, joiner=wf.last_result, deadline_s=60)
            (plan,) = compiler.run(f"What are the {what} of the station {station}?").rounds
            found.append(
                {
                    "notes": list(map(str, plan.notes)),
                    "calls": [re.match(r"\\w+", one.task.text).group() for one in plan.tasks],
                    "failed": sum(one.failed for one in plan.tasks),
                    "about it": any(station in one.task.text for one in plan.tasks),
                }
            )
    scripted = wf.Compiler(planner=wf.Scripted(plans=[example.PLAN]), tools=example.TOOLS, joiner=example.compare)
    print(json.dumps({"model": found, "scripted": str(scripted.run("Which would be warmer at sea level?"))}))
    example.POOL.shutdown()
    service.shutdown()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def server() -> Iterator[str]:
    command = [sys.executable, "-m", "stretto", "serve", "--port", "0", "--json-logs"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        addresses = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
        yield f"{next(found.group() for found in addresses if found)}/v1"
    finally:
        process.terminate()
        process.wait(60)
        assert process.stderr is not None
        process.stderr.close()


def test_real_tools_with_a_small_model_as_planner(
    tmp_path: Path, server: str, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "example.py").write_text("\n".join(blocks(ROOT / "docs" / "workflows.md", "python")), encoding="utf-8")
    (tmp_path / "with_model.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "with_model.py", server]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    record_property("plans", found["model"])
    assert found["scripted"] == "valley 22.12, summit 18.74 at sea level"
    known = {"read_temperatures", "altitude", "lapse_rate", "at_sea_level"}
    for plan in found["model"]:
        assert plan["notes"] == []
        assert plan["calls"]
        assert set(plan["calls"]) <= known
