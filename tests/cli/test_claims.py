"""`stretto claims` and `stretto systems`: what they print, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stretto.cli import application
from stretto.core.errors import UserError

from ..claims.fake import fake_claims

HELD = """
@claim(system="flover", says="it [fuses] 32 requests", kind="simulated", published=8.0, unit="x", tolerance=0.25,
       setting="GPT-J-6B on one GPU", constants={"bandwidth": "a data sheet"})
def fuses(quick):
    return Figure(ours=8.5 if quick else 9.0, null=2.0, note="small")

@claim(system="flover", says="it frees slots", kind="exact", published=None)
def frees(quick):
    return Figure(ours=True)
"""
REPORTED = """
@claim(system="nexus", says="it is quick, perhaps", kind="measured", published=100.0, doubtful=True)
def perhaps(quick):
    return Figure(ours=1.0)
"""
MISSED = """
@claim(system="nexus", says="it is quick", kind="measured", published=100.0)
def slow(quick):
    return Figure(ours=1.0)
"""
FAILED = """
@claim(system="nexus", says="it is sound", kind="measured", published=100.0)
def unsound(quick):
    raise RuntimeError("no luck")
"""
FOREIGN = HELD.replace('"flover"', '"elsewhere"')

FIELDS = [
    "system",
    "name",
    "says",
    "kind",
    "setting",
    "published",
    "ours",
    "ratio",
    "null",
    "verdict",
    "constants",
    "fitted_on",
    "seconds",
    "holds",
    "unit",
    "note",
]


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(application(), arguments, env={"COLUMNS": "160"}, catch_exceptions=False)
    return done.exit_code, done.stdout


def test_json_has_the_fields_of_a_row(tmp_path: Path) -> None:
    with fake_claims(tmp_path, HELD):
        code, out = invoke("claims", "flover", "--json")
    rows: list[dict[str, Any]] = json.loads(out)
    assert code == 0
    assert [list(row) for row in rows] == [FIELDS, FIELDS]
    fuses, frees = rows
    assert {**fuses, "seconds": None} == {
        "system": "flover",
        "name": "fuses",
        "says": "it [fuses] 32 requests",
        "kind": "simulated",
        "setting": "GPT-J-6B on one GPU",
        "published": 8.0,
        "ours": 9.0,
        "ratio": 1.125,
        "null": 2.0,
        "verdict": "held",
        "constants": {"bandwidth": "a data sheet"},
        "fitted_on": None,
        "seconds": None,
        "holds": True,
        "unit": "x",
        "note": "small",
    }
    assert (frees["published"], frees["ours"], frees["ratio"]) == (None, True, None)


def test_quick_reaches_the_claims(tmp_path: Path) -> None:
    with fake_claims(tmp_path, HELD):
        _, out = invoke("claims", "--quick", "--json")
    assert json.loads(out)[0]["ours"] == 8.5


def test_people_see_figures_verdicts_settings_and_constants(tmp_path: Path) -> None:
    with fake_claims(tmp_path, HELD + REPORTED):
        code, out = invoke("claims")
    assert code == 0
    for text in ("claims of flover", "claims of nexus", "9 x", "8 x", "2 x", "True", "held", "reported"):
        assert text in out
    for text in ("fuses: it [fuses] 32 requests", "GPT-J-6B on one GPU", "bandwidth from a data sheet"):
        assert text in out
    assert "small" in out


@pytest.mark.parametrize(
    ("source", "expected"),
    [(HELD, 0), (HELD + REPORTED, 0), (HELD + MISSED, 1), (HELD + FAILED, 1)],
    ids=["held", "reported", "missed", "failed"],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_exit_code_says_whether_all_that_is_judged_holds(
    tmp_path: Path, source: str, expected: int, options: tuple[str, ...]
) -> None:
    with fake_claims(tmp_path, source):
        code, out = invoke("claims", *options)
    assert code == expected
    assert ("no luck" in out) == ("no luck" in source)


def test_a_system_without_claims_says_so(tmp_path: Path) -> None:
    with fake_claims(tmp_path, MISSED):
        assert invoke("claims", "tawa") == (0, "tawa has no claims yet\n")
        assert invoke("claims", "tawa", "--json") == (0, "[]\n")


def test_a_system_that_others_add_is_known(tmp_path: Path) -> None:
    with fake_claims(tmp_path, FOREIGN):
        code, out = invoke("claims", "elsewhere", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    with pytest.raises(UserError, match="'elsewhere'"):
        invoke("claims", "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("claims", "flovver"), ["'flovver'", "flover", "zorse"]), (("systems", "--room", "attic"), ["'attic'", "serve"])],
)
def test_an_unknown_name_is_one_clear_line(arguments: tuple[str, ...], words: list[str]) -> None:
    command = [sys.executable, "-m", "stretto", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert [word for word in words if word not in done.stderr] == []


def test_systems_as_json(tmp_path: Path) -> None:
    with fake_claims(tmp_path, HELD):
        code, out = invoke("systems", "--json")
    listed = {each["name"]: each for each in json.loads(out)}
    assert (code, len(listed)) == (0, 52)
    assert set(listed["flover"]) == {
        "name",
        "title",
        "publication",
        "room",
        "what",
        "modules",
        "turned_on_by",
        "state",
    }
    assert (listed["flover"]["state"], listed["tawa"]["state"]) == ("here", "to come")
    with fake_claims(tmp_path, REPORTED):
        _, out = invoke("systems", "--json")
    assert {each["name"]: each["state"] for each in json.loads(out)}["flover"] == "part"


def test_systems_of_a_room(tmp_path: Path) -> None:
    with fake_claims(tmp_path, HELD):
        code, out = invoke("systems", "--room", "serve")
    assert code == 0
    assert "flover" in out
    assert "serve: layout: slots" in out
    assert "1 here, 1 in part, 7 to come" in out
    assert "marlin" not in out
