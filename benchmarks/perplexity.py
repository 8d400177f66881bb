"""What quantising costs in quality: perplexity, KL divergence and agreement on held-out text, the packaged model.

The text is that of Debian's package `debian-handbook` (fetched by apt-get into a temporary folder, or `--package
FILE`; its SHA-256 is checked), chapters dealt out alternately: quantisers see the one half (32 windows of 512 tokens),
figures are of the other (60 windows; KL and agreement with fp32 of 12 of them). The reference is the packaged GGUF file
dequantised to fp32; its own 4-bit blocks are what the fused paths run. All others quantise its dequantised matrices
once more; embedding and head stay in the file's 8 bits. W4A8, W4Ax and W4A4 are rounded activations on top of GPTQ
weights, in the plain reference form of `models/quantize/mixed.py`.

Goals: perplexity fp32 <= GPTQ <= RTN for each group; W4Ax with at most 30 % of its blocks in 8 bits within 5 % of
W4A16; W4A16 <= W4Ax < W4A4. `--quick` takes 20 windows, group 64 and 8 windows of calibration.

Usage: python benchmarks/perplexity.py [--json] [--quick] [--package FILE] [--markdown] [--windows N] [--calibration N]
       [--only NAMES]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "60000")

import torch

import harness
from stretto.models.assemble import build
from stretto.models.load import ModelFiles, load_model, open_model
from stretto.models.quantize.grid import Grid
from stretto.models.quantize.layerwise import Recipe, quantise_model, with_quantised
from stretto.models.quantize.mixed import fake_product
from stretto.models.quantize.mixed_model import calibrate_mixed
from stretto.models.quantized import PackedTensor
from stretto.models.segment import Segment
from stretto.models.thread import compute
from stretto.models.weights import Weights

PACKAGE = "debian-handbook"
SHA256 = "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"  # version 11.20220922
PAGES = "usr/share/doc/debian-handbook/html/en-US"
WINDOW = 512
EVALUATED, CALIBRATED = 60, 32
COMPARED = 12
"""Windows of which fp32's whole distributions are kept: 100 MB each."""
QUICK = (20, 8)
GROUPS = {"32": 32, "64": 64, "128": 128, "column": -1}
SHARES = (0.3, 0.1)
MIXED_GOAL, ORDER_GOAL = 1.05, 1.0


class Text(HTMLParser):
    """The text of a page of the handbook, a line a block, without its navigation and tables of contents."""

    _BLOCKS = frozenset(("p", "div", "li", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "tr", "table"))
    _LEFT_OUT = frozenset(("docnav", "docnav top", "toc", "banner", "title"))

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._inside = 0  # of what is left out

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        skipped = tag in ("head", "script") or named.get("id") in self._LEFT_OUT
        skipped = skipped or (named.get("class") in self._LEFT_OUT and not tag.startswith("h"))
        if self._inside or skipped:
            self._inside += 1
        elif tag in self._BLOCKS:
            self.pieces.append("\n")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if self._inside:
            self._inside -= 1

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.pieces.append(data)

    @classmethod
    def of(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        lines = (" ".join(line.split()) for line in "".join(parser.pieces).split("\n"))
        return "\n".join(line for line in lines if line) + "\n"


class Links(HTMLParser):
    """The pages that the table of contents names, each once, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[str, None] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        target = dict(attributes).get("href") or ""
        page = target.partition("#")[0]
        if tag == "a" and page.endswith(".html") and "/" not in page and page != "index.html":
            self.pages[page] = None


def chapters(package: Path | None) -> list[str]:
    """The chapters of the handbook as plain text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if package is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=300)
            package = next(folder.glob("*.deb"))
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != SHA256:
            sys.exit(f"{package.name} has SHA-256 {found}; {SHA256} is expected")
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "all")], check=True, timeout=300)
        pages = folder / "all" / PAGES
        links = Links()
        links.feed((pages / "index.html").read_text(encoding="utf-8"))
        texts: list[str] = []
        for page in links.pages:
            text = Text.of((pages / page).read_text(encoding="utf-8"))
            if page.startswith("sect.") and texts:
                texts[-1] += text
            else:
                texts.append(text)
        return texts


def windows(files: ModelFiles, texts: Sequence[str], count: int) -> torch.Tensor:
    """int64 [count, WINDOW], spread evenly over the texts."""
    ids = files.tokenizer.encode("".join(texts), special=False)
    assert len(ids) >= count * WINDOW, f"{len(ids)} tokens are too few"
    starts = [round(i * (len(ids) - WINDOW) / (count - 1)) for i in range(count)]
    return torch.tensor([ids[start : start + WINDOW] for start in starts])


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one way to run the model: on all windows the perplexity, on some the rest."""

    name: str
    perplexity: float
    divergence: float
    agreement: float
    matrix_bytes: float
    note: str = ""


@dataclass
class Judge:
    """The evaluation text, and what fp32 says about some of it."""

    windows: torch.Tensor
    compared: int
    reference: list[torch.Tensor] = field(default_factory=list)
    found: dict[str, Figures] = field(default_factory=dict)

    def judge(self, name: str, decoder: Any, matrix_bytes: float, note: str = "") -> Figures:
        """Run all windows; the first to be judged is the reference."""
        loss, divergence, agreement = 0.0, 0.0, 0.0
        first = not self.found
        for index, ids in enumerate(self.windows):
            cache = decoder.new_cache(pages=1, page_tokens=WINDOW)
            logits = decoder.forward(ids, [Segment(0, WINDOW, 0, (0,), WINDOW)], cache)
            said = logits.log_softmax(-1)
            if first and index < self.compared:
                self.reference.append(said)
            loss -= float(said[:-1].gather(1, ids[1:, None]).double().sum())
            if index < self.compared:
                meant = self.reference[index]
                divergence += float((meant.exp() * (meant - said)).sum(-1).double().mean()) / self.compared
                agreement += float((meant.argmax(-1) == said.argmax(-1)).double().mean()) / self.compared
        count = len(self.windows) * (WINDOW - 1)
        figures = Figures(
            name=name,
            perplexity=math.exp(loss / count),
            divergence=divergence,
            agreement=agreement,
            matrix_bytes=matrix_bytes,
            note=note,
        )
        self.found[name] = figures
        print(table_row(figures), file=sys.stderr, flush=True)
        return figures


def judge_all(judge: Judge, files: ModelFiles, calibration: torch.Tensor, groups: Sequence[str], quick: bool) -> None:
    spec, weights = files.spec, files.weights
    packed = [each for each in weights.sources.values() if isinstance(each, PackedTensor) and len(each.shape) == 2]
    threads = torch.get_num_threads()

    def torch_model(changed: Weights, **more: Any) -> Any:
        return build(spec, changed, dtype=torch.float32, threads=threads, **more)

    matrices = [each.shape[0] * each.shape[1] for each in packed]
    judge.judge("fp32", torch_model(weights), 4.0 * sum(matrices))

    def judge_recipe(name: str, recipe: Recipe) -> None:
        text = None if recipe.method == "clip" else calibration  # the scales that need no text
        found = dict(quantise_model(spec, weights, recipe, text))
        size = float(sum(each.nbytes for each in found.values()))
        judge.judge(name, torch_model(with_quantised(weights, found)), size)

    for name, recipe in recipes(groups, quick):
        if wanted(name):
            judge_recipe(name, recipe)
    for path, dtype in (("exact", "fp32"), ("bf16", "bf16"), ("fast", "bf16")):
        name = f"as packaged, {path}"
        if wanted(name) and (not quick or path == "fast"):
            model = load_model("default", dtype=dtype, path=path, threads=threads)
            judge.judge(name, model.transformer, float(sum(each.nbytes for each in packed)))

    if not quick and wanted("W4"):
        judge_mixed(judge, files, calibration, torch_model)


def wanted(name: str) -> bool:
    """Whether `--only` names this row, or nothing was left out."""
    only = harness.options.only
    return only is None or any(name.startswith(part) for part in only.split(";"))


def judge_mixed(judge: Judge, files: ModelFiles, calibration: torch.Tensor, torch_model: Callable[..., Any]) -> None:
    spec, weights = files.spec, files.weights
    mixed = calibrate_mixed(spec, weights, calibration)
    changed = mixed.weights(weights)
    head = weights.sources["model.embed_tokens.weight"]
    assert isinstance(head, PackedTensor)
    size = float(head.nbytes + sum(each.weight.nbytes for each in mixed.products.values()))
    judge.judge("W4A16 (GPTQ, 128, ordered)", torch_model(changed), size)
    for label, share in [*[(f"W4Ax, {share:.0%}", share) for share in SHARES], ("W4A4", 0.0), ("W4A8", 1.0)]:
        plans = mixed.plans(share)
        eights = sum(float((plan.bits == 8).sum()) for plan in plans.values())
        share = eights / sum(len(plan.bits) for plan in plans.values())
        model = torch_model(changed, product=fake_product(plans, mixed.divisors))
        judge.judge(label, model, size, f"{share:.1%} of blocks in 8 bits")


def recipes(groups: Sequence[str], quick: bool) -> Iterator[tuple[str, Recipe]]:
    for name in groups:
        for method in ("rtn", "gptq") if quick else ("rtn", "clip", "gptq"):
            yield f"{method}, group {name}", Recipe(method=method, grid=Grid(group=GROUPS[name]))
    if quick:
        return
    yield "rtn, group 64, zero points", Recipe(method="rtn", grid=Grid(group=64, symmetric=False))
    for method in ("rtn", "gptq"):
        yield f"{method}, group 64, 2:4", Recipe(method=method, grid=Grid(group=64), sparse="2:4")
    yield "gptq, group 64, largest first", Recipe(method="gptq", grid=Grid(group=64), act_order=True)
    yield "rtn, group 64, 8 bits", Recipe(method="rtn", grid=Grid(bits=8, group=64))


def measure(quick: bool) -> Sequence[harness.Row]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    evaluated, calibrated = QUICK if quick else (EVALUATED, CALIBRATED)
    evaluated, calibrated = harness.options.windows or evaluated, harness.options.calibration or calibrated
    texts = chapters(harness.options.package)
    files = open_model("default")
    judge = Judge(windows(files, texts[1::2], evaluated), min(COMPARED, evaluated))
    groups = ["64"] if quick else list(GROUPS)
    judge_all(judge, files, windows(files, texts[0::2], calibrated), groups, quick)
    if harness.options.markdown:
        print_table(judge.found.values())
    return [*reported(judge.found.values()), *goals(judge.found, groups, quick)]


def reported(found: Any) -> Iterator[harness.Row]:
    for each in found:
        note = f"KL {each.divergence:.4f}, top-1 {each.agreement:.1%}, {each.matrix_bytes / 1e6:.1f} MB"
        note += f"; {each.note}" if each.note else ""
        yield harness.Row(name=each.name, ours=each.perplexity, unit="perplexity", goal=None, note=note)


def goals(found: Mapping[str, Figures], groups: Sequence[str], quick: bool) -> Iterator[harness.Row]:
    def order(worse: str, better: str, goal: float = ORDER_GOAL, *, at_most: bool = False) -> Iterator[harness.Row]:
        if worse not in found or better not in found:
            return
        ours, peer = found[worse].perplexity, found[better].perplexity
        yield harness.Row(
            name=f"{worse} over {better}",
            ours=ours,
            peer=peer,
            unit="perplexity",
            ratio=ours / peer,
            goal=goal,
            at_most=at_most,
        )

    for name in groups:
        yield from order(f"rtn, group {name}", f"gptq, group {name}")
        yield from order(f"gptq, group {name}", "fp32")
    if quick:
        return
    mixed, plain = f"W4Ax, {max(SHARES):.0%}", "W4A16 (GPTQ, 128, ordered)"
    yield from order(mixed, plain, MIXED_GOAL, at_most=True)
    yield from order(mixed, plain)
    yield from order("W4A4", mixed)


def print_table(found: Any) -> None:
    print("| way | perplexity | KL to fp32 | same first choice | matrices |\n| --- | ---: | ---: | ---: | ---: |")
    for each in found:
        print(table_row(each))


def table_row(of: Figures) -> str:
    name = of.name + (f" ({of.note})" if of.note else "")
    size = f"{of.matrix_bytes / 1e6:.1f} MB"
    return f"| {name} | {of.perplexity:.3f} | {of.divergence:.4f} | {of.agreement:.1%} | {size} |"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--package", type=Path, help="the .deb file, if it is here already")
    parser.add_argument("--windows", type=int, help=f"of the evaluation; {EVALUATED}, quick {QUICK[0]}")
    parser.add_argument("--calibration", type=int, help=f"windows that quantisers see; {CALIBRATED}, quick {QUICK[1]}")
    parser.add_argument("--only", help="rows whose names begin so, several with ; between; fp32 is always there")
    parser.add_argument("--markdown", action="store_true", help="print a table too")


if __name__ == "__main__":
    sys.exit(compute(harness.main, measure, __doc__, add=add_options))
