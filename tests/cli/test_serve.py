"""`stretto serve` and `stretto batch` as processes: flags over environment over file, signals, logs, mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from stretto.cli.serve import Options, chosen_plan, costs_of, read_config, settings_of
from stretto.core.errors import UserError
from stretto.core.plan import Plan
from stretto.hardware import catalog
from stretto.serve.job import ServeJob
from stretto.serve.plan import ServePlan

from ..models.conftest import make_reference, tiny_tokenizer_json  # noqa: F401

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    found = tmp_path_factory.mktemp("tiny-llama")
    make_reference("llama").save_pretrained(found)
    (found / "tokenizer.json").write_text(tiny_tokenizer_json)
    (found / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return found


class Process:
    """`stretto serve` on a free port."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stretto", "serve", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.lines))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=20)
        deadline = time.perf_counter() + 20
        while not self._answers():
            assert time.perf_counter() < deadline

    def _answers(self) -> bool:
        try:
            return bool(self.client.get("/version").status_code)
        except httpx.ConnectError:
            return False

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; returns the exit code and all that was logged."""
        self.process.send_signal(number)
        rest = self.process.communicate(timeout=20)[1]
        return self.process.returncode, "".join(self.lines) + rest


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Process] = []

    def run(*arguments: str | Path, environment: dict[str, str] | None = None) -> Process:
        started.append(Process(*arguments, environment=environment))
        return started[-1]

    yield run
    for each in started:
        each.client.close()
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


def test_a_server_from_flags_environment_and_file(folder: Path, tmp_path: Path, start: Any) -> None:
    (tmp_path / "serve.yaml").write_text("port: 1\nmax-num-seqs: 3\nmax_queue: 7\nserved-model-name: file\n")
    server = start(
        *(folder, "--config", tmp_path / "serve.yaml", "--port", "0", "--threads", "1", "--json-logs"),
        environment={"STRETTO_MAX_NUM_SEQS": "5", "STRETTO_PORT": "2", "STRETTO_API_KEY": "sesame"},
    )
    key = {"Authorization": "Bearer sesame"}
    assert server.client.get("/v1/models").status_code == 401
    assert server.client.get("/v1/models", headers=key).json()["data"][0]["id"] == "file"
    assert server.client.get("/v1/stretto/live", headers=key).json()["slots"] == 5
    asked = {"prompt": "ab", "max_tokens": 3, "ignore_eos": True}
    assert server.client.post("/v1/completions", json=asked, headers={**key, "X-Request-Id": "r1"}).status_code == 200
    code, logged = server.end(signal.SIGTERM)
    assert code == 0
    lines = [json.loads(line) for line in logged.splitlines()]
    assert [line["new_tokens"] for line in lines if line.get("id") == "r1"] == [3]


def test_ctrl_c_drains_and_exits_with_130(folder: Path, start: Any) -> None:
    server = start(folder, "--port", "0", "--threads", "1")
    asked = {"prompt": "ab", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=asked) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    code, logged = server.process.wait(20), server.process.stderr.read()
    assert code == 130
    assert "draining" in logged
    assert "Traceback" not in logged


def test_a_killed_server_does_not_stop_the_next_one(folder: Path, start: Any) -> None:
    first = start(folder, "--port", "0", "--threads", "1")
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    second = start(folder, "--port", str(first.port), "--threads", "1")
    assert second.client.get("/health").status_code == 200


def stretto(*arguments: str | Path) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "stretto", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def one_line(arguments: Sequence[str | Path]) -> str:
    """The one line that a user's mistake is told in."""
    code, printed = stretto(*arguments)
    assert code == 2, printed
    assert printed.count("\n") == 1, printed
    return printed


def test_mistakes_are_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in one_line(["serve", folder, "--port", str(port)])
    assert "--max-model-len: the value is 999" in one_line(["serve", folder, "--port", "0", "--max-model-len", "999"])
    assert "nowhere" in one_line(["serve", folder / "nowhere"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(port=70000), "--port: the value is 70000; it must be in 0 .. 65535"),
        (Options(dtype="int3"), "--dtype: the value is 'int3'"),
        (Options(max_num_seqs=0), "--max-num-seqs"),
        (Options(max_num_batched_tokens=0), "--max-num-batched-tokens"),
        (Options(prefill="chunked"), "--prefill: the value is 'chunked'; it must be mixed or lanes"),
        (Options(prefill="lanes", path="torch"), "--path: the value is 'torch'; it must be exact, bf16 or fast"),
        (
            Options(prefill="lanes", dtype="int4"),
            "--dtype: the value is 'int4'; it must be fp32 or bf16, where prompts",
        ),
        (Options(prefill="lanes", preemption="swap", spare_tokens=9), "--preemption: the value is 'swap'"),
        (Options(api_key=("clé",)), "--api-key"),
        (Options(max_body_bytes=1), "--max-body-bytes"),
        (Options(drain_seconds=-1.0), "--drain-seconds"),
        (Options(served_model_name=" "), "--served-model-name"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_flag(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        settings_of(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: many\n", "serve.yaml:1: port"),
        ("host: a\n\nprot: 1\n", "serve.yaml:3: prot: there is no such field"),
        ("max-queue: [1]\n", "serve.yaml:1: max_queue"),
        ("- 1\n", "the file holds no fields"),
    ],
)
def test_mistakes_in_a_configuration_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(tmp_path / "serve.yaml")


def test_keys_in_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("api-key: one\n")
    assert read_config(tmp_path / "serve.yaml").api_key == ("one",)
    (tmp_path / "serve.yaml").write_text("api-key: [one, two]\n")
    assert settings_of(read_config(tmp_path / "serve.yaml")).api_keys == ("one", "two")


def test_what_is_said_nearer_wins() -> None:
    merged = Options(port=1, json_logs=False).over(Options(port=2, host="h", json_logs=True))
    assert (merged.port, merged.host, merged.json_logs) == (1, "h", False)


def test_only_a_foreign_address_without_a_key_is_warned_of(folder: Path, start: Any) -> None:
    server = start(folder, "--port", "0", "--threads", "1")
    assert "WARNING" not in "".join(server.lines)
    process = subprocess.Popen(
        [sys.executable, "-m", "stretto", "serve", str(folder), "--host", "0.0.0.0", "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "anyone who reaches 0.0.0.0 may use this server" in process.stderr.readline()
    finally:
        process.kill()
        process.communicate()


def request(name: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {"max_tokens": 4, **body}})


def test_a_batch(folder: Path, tmp_path: Path) -> None:
    lines = [request(f"r{i}", prompt="ab", seed=i % 5, temperature=2) for i in range(30)]
    lines += ["", request("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "ab"}], stream=True)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = ("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", folder, "--threads", "1")
    code, printed = stretto(*command, "--max-num-seqs", "4")
    assert code == 0, printed
    assert "31 answered, 0 refused" in printed
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = {one["custom_id"]: one["response"]["body"]["choices"][0].get("text") for one in found}
    assert set(texts) == {f"r{i}" for i in range(30)} | {"chat"}
    assert all(texts[f"r{i}"] == texts[f"r{i % 5}"] for i in range(30))

    (tmp_path / "in.jsonl").write_text(request("good", prompt="ab") + "\n" + request("bad", prompt=5))
    code, printed = stretto(*command)
    assert code == 1
    assert "1 answered, 1 refused" in printed
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    statuses = {one["custom_id"]: one["response"]["status_code"] for one in found}
    assert statuses == {"good": 200, "bad": 400}


@pytest.mark.parametrize(
    "text", ["{", "5", '{"custom_id": "a"}', request("a", "/v1/other"), request("a") + "\n" + request("a")]
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str) -> None:
    from stretto.serve.http.batch import read_batch

    (tmp_path / "in.jsonl").write_text(request("first") + "\n\n" + text)
    with pytest.raises(UserError, match=r"in\.jsonl:[34]: "):
        read_batch(tmp_path / "in.jsonl")


def plan_of(**choices: Any) -> Plan[Any, Any]:
    """A plan for a device of the catalog; what is not given is ordinary."""
    ordinary = {"device": "gpu", "dtype": "fp32", "threads": 1, "slots": 3, "joining": "shortest", "page_tokens": 64}
    machine = SimpleNamespace(device={"gpu": catalog.device("a40")}.__getitem__)
    return Plan(kind="serve", job=ServeJob(prompts=("ab",)), choices=ServePlan(**(ordinary | choices)), cluster=machine)


def test_a_plan_says_how_and_flags_go_before_it() -> None:
    chosen = plan_of(layout="slots", reorder="never", prefill_tokens=100)
    engine = settings_of(Options(max_num_seqs=5), chosen).engine
    assert (engine.model, engine.slots, engine.joining) == (chosen.job.model, 5, "shortest")
    assert (engine.layout, engine.reorder, engine.prefill_tokens, engine.dtype) == ("slots", "never", 100, "fp32")


def test_a_plan_of_two_lanes_is_served_in_two_lanes() -> None:
    engine = settings_of(Options(), plan_of(path="exact", prefill="lanes")).engine
    assert (engine.prefill, engine.lane_threads) == ("lanes", 1)


def test_predictions_are_shown_for_what_was_planned_alone() -> None:
    chosen = plan_of()
    costs = costs_of(chosen, settings_of(Options(), chosen))
    assert costs is not None
    assert costs.decode_s([5], 1)[0] > 0
    assert costs_of(chosen, settings_of(Options(threads=2), chosen)) is None


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (plan_of(instances=2), "p.yaml: choices.instances: the plan has 2 instances"),
        (replace(plan_of(), kind="train"), "p.yaml: the plan is of kind train"),
    ],
)
def test_plans_that_cannot_be_served(chosen: Plan[Any, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stretto.chosen_plan", lambda *_, **__: chosen)
    with pytest.raises(UserError, match=re.escape(message)):
        chosen_plan(Options(plan="p.yaml"))


def test_a_plan_for_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stretto.chosen_plan", lambda *_, **__: plan_of())
    assert chosen_plan(Options(plan="p.yaml")).choices.slots == 3
    with pytest.raises(UserError, match="not for other"):
        chosen_plan(Options(plan="p.yaml", model="other"))


def test_static_batches_are_refused() -> None:
    with pytest.raises(UserError, match=r"joining.*static batches wait"):
        settings_of(Options(), plan_of(joining="static"))
