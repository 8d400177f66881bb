"""From a model's name to a folder with its quantised form: what `stretto quantize` does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stretto.core.errors import UserError, require
from stretto.hardware.probe import cores_here
from stretto.models.load import open_model
from stretto.models.quantize.checkpoint import check_place, write_checkpoint
from stretto.models.quantize.layerwise import Progress, Recipe, quantise_model
from stretto.models.quantized import Quantised
from stretto.models.thread import compute
from stretto.models.tokenizer import Tokenizer

_MOST_TEXT_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that a quantiser sees: `windows` stretches of `tokens` tokens, spread evenly over `file`.

    A model that takes fewer tokens sees shorter stretches.
    """

    file: Path
    windows: int = 32
    tokens: int = 512

    def __post_init__(self) -> None:
        require(1 <= self.windows <= 4096, "windows", self.windows, "from 1 to 4096")
        require(2 <= self.tokens <= 2**17, "tokens", self.tokens, f"from 2 to {2**17}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written.

    Attributes:
        matrices: how many there are by what made them; a method that had to fall back shows as the other.
        matrix_bytes: of all quantised matrices, as stored.
        plain_bytes: of the same matrices in bf16.
        calibration_tokens: that the quantiser saw.
    """

    folder: Path
    matrices: dict[str, int]
    matrix_bytes: int
    plain_bytes: int
    calibration_tokens: int
    seconds: float


def quantise_to(
    folder: Path,
    name_or_path: str,
    recipe: Recipe,
    text: Calibration | None = None,
    *,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Quantise a model and write it to a new folder, which `load_model` and others read.

    Args:
        name_or_path: as for `load_model`.
        threads: CPU threads; all CPUs when None.

    Raises:
        UserError: the model or the text cannot be read, the method needs a text, or the folder cannot be made.
    """
    check_place(folder)
    return compute(_run, folder, name_or_path, recipe, text, threads or cores_here(), progress)


def text_windows(tokenizer: Tokenizer, text: Calibration) -> torch.Tensor:
    """int64 [windows, tokens] from the text, evenly spread; fewer windows where it is short.

    Raises:
        UserError: the file cannot be read, is no UTF-8, or is shorter than one window.
    """
    try:
        if text.file.stat().st_size > _MOST_TEXT_BYTES:
            raise UserError("is larger than 256 MiB", file=str(text.file), field="text", right="give a part of it")
        read = text.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"cannot be read: {reason}", file=str(text.file), field="text", right="give a plain text file"
        ) from None
    ids = tokenizer.encode(read, special=False)
    count = min(text.windows, len(ids) // text.tokens)
    if count == 0:
        raise UserError(
            f"has {len(ids)} tokens", file=str(text.file), field="text", right=f"at least {text.tokens}, one window"
        )
    starts = [round(i * (len(ids) - text.tokens) / max(count - 1, 1)) for i in range(count)]
    return torch.tensor([ids[start : start + text.tokens] for start in starts])


def _run(folder: Path, name: str, recipe: Recipe, text: Calibration | None, threads: int, progress: Progress) -> Report:
    start = time.perf_counter()
    torch.set_num_threads(threads)
    files = open_model(name)
    windows = None
    if text is not None:
        windows = text_windows(files.tokenizer, replace(text, tokens=min(text.tokens, files.spec.max_positions)))
    counts: Counter[str] = Counter()
    sizes = [0, 0]

    def counted() -> Iterator[tuple[str, Quantised]]:
        for tensor, matrix in quantise_model(files.spec, files.weights, recipe, windows, progress):
            counts[matrix.method] += 1
            sizes[0] += matrix.nbytes
            sizes[1] += 2 * len(matrix.values) * matrix.length
            yield tensor, matrix

    write_checkpoint(folder, files.spec, files.weights, files.tokenizer, recipe, counted())
    return Report(
        folder=folder,
        matrices=dict(counts),
        matrix_bytes=sizes[0],
        plain_bytes=sizes[1],
        calibration_tokens=0 if windows is None or recipe.method == "rtn" else windows.numel(),
        seconds=time.perf_counter() - start,
    )
