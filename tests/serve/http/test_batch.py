"""Files of requests: lines that ask for much wait for each other, and nothing is lost to a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stretto.core.errors import UserError
from stretto.serve.http.batch import Line, run_batch
from stretto.serve.http.run import bind
from stretto.serve.http.settings import ServerSettings
from stretto.serve.settings import EngineSettings


def lines(count: int, **fields: Any) -> list[Line]:
    body = json.dumps({"prompt": "ab", "max_tokens": 1, **fields}).encode()
    return [Line(number=i, custom_id=str(i), url="/v1/completions", body=body) for i in range(1, count + 1)]


def settings(folder: Path, **options: Any) -> ServerSettings:
    return ServerSettings(engine=EngineSettings(model=str(folder), dtype="fp32", threads=1, slots=2), **options)


def test_lines_that_ask_for_many_answers_are_all_answered(chat_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    counts = run_batch(settings(chat_folder, max_queue=6), lines(6, n=8), output)
    assert (counts.answered, counts.refused) == (6, 0)
    found = [json.loads(text) for text in output.read_text().splitlines()]
    assert sorted(each["custom_id"] for each in found) == list("123456")
    assert {len(each["response"]["body"]["choices"]) for each in found} == {8}


def test_what_is_there_stays_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("of yesterday")
    with pytest.raises(UserError):
        run_batch(settings(tmp_path / "none.gguf"), lines(1), output)
    assert output.read_text() == "of yesterday"


def test_a_full_disk_is_told(chat_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^/dev/full: the file cannot be written: No space left on device"):
        run_batch(settings(chat_folder), lines(3), Path("/dev/full"))


def test_names_that_are_none_are_told() -> None:
    with pytest.raises(UserError, match=r"cannot listen on 127\.\.0\.1:0: .*; choose another --host"):
        bind("127..0.1", 0)
