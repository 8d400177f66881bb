"""docs/serving.md says what is so: its examples run, its tables are complete."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

import stretto
from stretto.cli import application
from stretto.cli.serve import Options, read_config, settings_of
from stretto.models.load import Model
from stretto.serve.http.batch import read_batch

from .conftest import Running, running

TEXT = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
HERE = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def column(heading: str) -> set[str]:
    """The code in the first column of the table under a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))


CURLS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("curl")]


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    with running(chat_model, served_model_name="smollm2-135m-instruct") as found:
        yield found


@pytest.mark.parametrize("line", CURLS)
def test_requests_are_answered(client: httpx.Client, line: str) -> None:
    words = shlex.split(line)
    header, body = words[words.index("-H") + 1].split(": "), words[words.index("-d") + 1]
    reply = client.post(words[1].removeprefix(HERE), content=body, headers=dict([header]))
    assert reply.status_code == 200, reply.text


def test_the_official_client(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [block for block in blocks("python") if "openai" in block]
    exec(compile(code.replace(HERE, server.url), "serving.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_offline_class(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = stretto.LLM
    monkeypatch.setattr(stretto, "LLM", lambda model, **o: kind(str(chat_folder), dtype="fp32", threads=1, **o))
    codes = [block for block in blocks("python") if "stretto.LLM" in block]
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "serving.md", "exec"), {})


def test_the_configuration_file(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    (tmp_path / "serve.yaml").write_text(text)
    settings = settings_of(read_config(tmp_path / "serve.yaml"))
    assert (settings.port, settings.engine.slots, len(settings.api_keys)) == (8080, 16, 2)


def test_the_batch_line(tmp_path: Path) -> None:
    [text] = blocks("json")
    (tmp_path / "in.jsonl").write_text(text)
    assert json.loads(read_batch(tmp_path / "in.jsonl")[0].body)["max_tokens"] == 16


def test_the_flags_are_those_of_the_command() -> None:
    commands: Any = typer.main.get_command(application())
    flags = {option.opts[0] for option in commands.commands["serve"].params if option.opts[0].startswith("--")}
    assert column("Flags") == flags


def test_the_defaults_are_those_of_the_settings() -> None:
    settings = settings_of(Options())
    shown = dict(re.findall(r"^\| `--([\w-]+)` \| `([^`]+)`", TEXT, re.MULTILINE))
    engine = settings.engine
    assert shown == {
        "host": settings.host,
        "port": str(settings.port),
        "max-num-seqs": str(engine.slots),
        "max-num-batched-tokens": str(engine.prefill_tokens),
        "prefill": engine.prefill,
        "dtype": engine.dtype,
        "path": engine.path,
        "preemption": engine.preemption,
        "spare-tokens": str(engine.spare_tokens),
        "max-queue": str(settings.max_queue),
        "max-body-bytes": str(settings.max_body_bytes),
        "stall-seconds": f"{settings.stall_seconds:g}",
        "drain-seconds": f"{settings.drain_seconds:g}",
    }


def test_the_endpoints_are_those_of_the_server(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert column("Endpoints") == served | {"GET /openapi.json"}


def test_the_metrics_are_those_of_the_server(client: httpx.Client) -> None:
    found = re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.MULTILINE)
    assert column("Metrics") == {name for name in found if not name.endswith("_created")}
