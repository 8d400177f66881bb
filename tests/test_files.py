"""Files: numbers as people write them, mistakes at their place, and files that are written whole or not at all."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

import stretto
from stretto.cli.app import progress_bar
from stretto.core.errors import UserError
from stretto.core.eventlog import EventLog
from stretto.files import check_place, load_cluster, parse_yaml, write_text
from stretto.hardware.table_files import write_tables


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("25e9", 25e9), ("3.12e14", 3.12e14), ("-2E3", -2e3), (".5e1", 5.0), ("1.5", 1.5), ("7", 7)],
)
def test_numbers_with_exponents_are_numbers(text: str, value: float) -> None:
    assert parse_yaml(f"x: {text}", "f").data == {"x": value}
    assert parse_yaml("x: e5\ny: 1e\nz: 1.2.3e4", "f").data == {"x": "e5", "y": "1e", "z": "1.2.3e4"}


@pytest.mark.parametrize("text", ["x: !!bool maybe", "x: !!int one", "[" * 3000])
def test_what_is_no_plain_value_is_told(text: str) -> None:
    with pytest.raises(UserError, match=r"^job\.yaml"):
        parse_yaml(text, "job.yaml")


def test_fields_are_told_where_they_are(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("kind: serve\nprompts: [a]\nlimits: {memory: 4}\n")
    with pytest.raises(UserError, match=r"job.yaml:3: limits.memory: there is no such field; known here: "):
        stretto.load(job)
    job.write_text("kind: serve\nprompts: [a]\nmodell: x\n")
    with pytest.raises(
        UserError, match=r"job.yaml:3: modell: there is no such field; known here: kind, model, prompts"
    ):
        stretto.load(job)


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (
            "{name: x, bandwith: 1e9}",
            "5: nodes.0.link.bandwith: there is no such field; known here: name, kind, ",
        ),
        ("{name: x}", "5: nodes.0.link.kind: this field is missing; add it"),
        ("{name: x, kind: nvlink, bandwidth: fast}", "5: nodes.0.link.bandwidth: the value is 'fast'; it must be a "),
        ("5", "5: nodes.0.link: the value is 5; it must be a valid string"),
        ("nvlink99", "5: nodes.0.link: .*nvlink99"),
    ],
)
def test_of_a_value_that_may_be_of_two_kinds_the_nearer_one_is_told(tmp_path: Path, link: str, said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"name: a\nnodes:\n  - name: n\n    devices: [{{type: a100-sxm-80gb}}]\n    link: {link}\n")
    with pytest.raises(UserError, match=f"cluster.yaml:{said}"):
        load_cluster(file)


def test_a_field_that_is_misspelt_is_told_before_the_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: a\nnods: []\n")
    with pytest.raises(UserError, match=r"yaml:2: nods: there is no such field; known here: name, nodes, network"):
        load_cluster(tmp_path / "cluster.yaml")


def test_files_are_written_whole_and_pipes_straight(tmp_path: Path) -> None:
    file, pipe = tmp_path / "plan.yaml", tmp_path / "pipe"
    old = os.umask(0o027)
    try:
        write_text(file, "a")
    finally:
        os.umask(old)
    assert file.read_text() == "a"
    assert file.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe)
    check_place(pipe)
    check_place(file)
    for wrong in (tmp_path, tmp_path / "none" / "plan.yaml"):
        with pytest.raises(UserError, match="the file cannot be written: "):
            check_place(wrong)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "b")
    reader.join(10)
    assert read == ["b"]
    assert pipe.is_fifo()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pipe", "plan.yaml"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the event log cannot be written"):
        EventLog().save(tmp_path / "none" / "log")
    with pytest.raises(UserError, match=r"the measurement cannot be kept: .*XDG_CACHE_HOME"):
        write_tables(tmp_path / "file" / "tables.json", {})
    with pytest.raises(UserError, match="the folder cannot be made or written"):
        stretto.write_report([], tmp_path / "file", title="x")


def test_a_bar_of_unknown_length_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(quiet=False) as progress:
        progress("starting workers", 0, 0)
        progress("requests", 3, 7)
        progress("starting workers", 1, 0)
    assert "starting workers" in capsys.readouterr().err
