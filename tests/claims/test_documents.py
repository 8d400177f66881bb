"""The generated pages are those that the code would write today, and a stale one is noticed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stretto.core.plan import Refusal
from stretto.serve.joining import JOININGS

from .fake import fake_claims

ROOT = Path(__file__).parents[2]

CLAIM = """
@claim(system="flover", says="32 requests | at once", kind="simulated", published=10.9, unit="x", tolerance=0.25,
       setting="GPT-J-6B", constants={"bandwidth": "a data sheet"})
def speedup(quick):
    raise AssertionError("pages do not compute figures")
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = spec_from_file_location("stretto_docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "docs" / "build.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_stale_page_is_named_and_written_anew(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["build.py"])
    assert build.main() == 0
    (tmp_path / "systems.md").write_text("old")
    (tmp_path / "capabilities" / "serving.md").unlink()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert build.main() == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "docs/systems.md",
        "docs/capabilities/serving.md",
    ]
    assert (tmp_path / "systems.md").read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["build.py"])
    assert build.main() == 0
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert build.main() == 0


def test_a_page_shows_choices_policies_pairs_and_claims_as_declared(build: ModuleType, tmp_path: Path) -> None:
    with fake_claims(tmp_path, CLAIM):
        pages = build.documents()
    page = pages["capabilities/serving.md"]
    assert "| `dtype` | `fp32`, `bf16`, `int4` |" in page
    assert [name for name in JOININGS if f"| `{name}` |" not in page] == []
    assert "First come, first served" in page
    assert "| 32 requests &#124; at once | 10.9 x | simulated | GPT-J-6B |" in page
    assert "- bandwidth: a data sheet" in page
    assert "`stretto claims flover`" in page
    assert "`benchmarks/predict_serving.py`" in page
    assert "benchmarks/clock.py" not in page
    assert "[flover](capabilities/serving.md#flover)" in pages["systems.md"]
    assert "[apex]" not in pages["systems.md"]


def test_a_pair_that_the_domain_refuses_is_shown_with_the_reason(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, *_ = build.CAPABILITIES
    real = type(serving.domain).check

    def check(self: Any, job: Any, plan: Any, cluster: Any) -> Refusal | None:
        if (plan.joining, plan.layout) == ("static", "slots"):
            return Refusal(reason="batches never join", nearest="layout: pages")
        return real(self, job, plan, cluster)

    monkeypatch.setattr(type(serving.domain), "check", check)
    page = build.capability_page(serving)
    assert "| `static` | together | batches never join |" in page
    assert "| `continuous` | together | together |" in page
