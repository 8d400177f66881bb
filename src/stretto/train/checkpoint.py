"""Checkpoints that any layout can load: parts of whole tensors, by name and place, in safetensors.

A checkpoint is a folder `step-N`. Each rank that holds a part nobody before it holds writes one file with the part of
each weight and of its optimizer's moments; `index.json` says of every part which stretch of which whole tensor it is,
the checksum of every file, and what else of the job the next steps depend on. The folder is made under another name and
renamed when all ranks have written, so that one that was cut off is never loaded. What a step sees and draws follows
from the job's seed and the step's number, so these two numbers are all the random state and all of the position in the
data that there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stretto.comm.transport import Axis
from stretto.core.errors import UserError
from stretto.models.causal_layers import Placement
from stretto.train.trainer import Trainer

FORMAT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTIAL = ".writing"
_HEARD_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a whole tensor, in a file.

    Attributes:
        name: of the tensor: a weight's, with "/exp_avg" or "/exp_avg_sq" behind it for a moment.
        file: in the checkpoint's folder.
        start, size: where the stretch begins, and its lengths.
    """

    name: str
    file: str
    start: tuple[int, ...]
    size: tuple[int, ...]


def save(trainer: Trainer, folder: Path, *, keep: int) -> Path:
    """Write the trainer's state after its last step; every rank calls it. Returns the checkpoint's folder.

    Raises:
        UserError: the folder cannot be written.
    """
    for hook in trainer.hooks:
        hook.flush()
    final = folder / f"step-{trainer.step}"
    writing = folder / f"{final.name}{_PARTIAL}"
    transport = trainer.transport
    everyone = transport.axis(*(name for name, _ in transport.grid.axes))
    try:
        if transport.rank == 0:
            _drop_unfinished(folder)
            writing.mkdir(parents=True)
        everyone.barrier()
        _together(everyone, lambda: _write_part(trainer, writing))
        if transport.rank == 0:
            _write_index(trainer, writing)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(writing, final)
            _drop_old(folder, keep)
        everyone.barrier()
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(writing, ignore_errors=True)  # it may be what has filled the disk
        raise _unwritable(folder, problem) from None
    return final


def check_place(folder: Path) -> None:
    """Make the folder of checkpoints, and `UserError` unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as problem:
        raise _unwritable(folder, problem) from None


def _unwritable(folder: Path, problem: Exception) -> UserError:
    why = getattr(problem, "strerror", None) or problem
    return UserError(f"cannot be written: {why}", file=str(folder), field="checkpoint", right="another folder")


def _together(everyone: Axis, work: Callable[[], None]) -> None:
    """Do a rank's own work, however long it takes: the ranks hear of each other meanwhile, so none is given up."""
    with ThreadPoolExecutor(1) as aside:
        own = aside.submit(work)
        while float(everyone.maximum_(torch.tensor([float(not own.done())]))):
            wait([own], timeout=_HEARD_S)
        own.result()


def newest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, None if there is none."""
    found = [each for each in folder.glob("step-*") if each.name[5:].isdigit() and (each / "index.json").is_file()]
    return max(found, key=lambda each: int(each.name[5:]), default=None)


def load(trainer: Trainer, checkpoint: Path) -> None:
    """Go on from a checkpoint, written under whatever layout; every rank calls it.

    Raises:
        UserError: the files are damaged, or of another model, optimizer or order of the data.
    """
    reader = Reader(checkpoint)
    for field, own in _bound(trainer).items():
        stored = reader.job.get(field)
        if stored != own:
            right = f"{stored}, with which it was trained, or another checkpoint folder"
            raise UserError(f"is {own}, and {checkpoint} goes on from another", field=field, right=right)
    trained = trainer.trained
    for name, parameter, place in zip(trained.names, trained.parameters, trained.places, strict=True):
        own = reader.stored_name(name)
        with torch.no_grad():
            parameter.copy_(reader.read(own, place, parameter))
        if trainer.job.optimizer.name == "adamw":
            state = {moment: reader.read(f"{own}/{moment}", place, parameter) for moment in _MOMENTS}
            trainer.optimizer.state[parameter] = {"step": torch.tensor(float(reader.step)), **state}
    trainer.step = reader.step


class Reader:
    """A checkpoint's whole tensors, or stretches of them.

    Attributes:
        step: steps that were done.
        job: what a job must have alike to go on from here.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = _read_index(folder)
        self.step = int(index["step"])
        self.job: Mapping[str, Any] = index["job"]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in index["tensors"].items()}
        self._parts: dict[str, list[Part]] = {}
        for row in index["parts"]:
            part = Part(name=row["name"], file=row["file"], start=tuple(row["start"]), size=tuple(row["size"]))
            self._parts.setdefault(part.name, []).append(part)
        for file, digest in index["files"].items():
            if Path(file).name != file or _digest(folder / file) != digest:
                raise _damaged(folder / file, "its checksum is not the one in the index")
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        """The weights' names."""
        return [name for name in self.shapes if "/" not in name]

    def stored_name(self, name: str) -> str:
        """The name under which a weight is stored: a tied head is its embedding."""
        tied = name == "lm_head.weight" and name not in self.shapes
        return "model.embed_tokens.weight" if tied else name

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        shape = self.shapes[name]
        like = torch.empty(shape, dtype=self._dtype(name))
        return self.read(name, Placement(shape=shape, start=(0,) * len(shape)), like)

    def read(self, name: str, place: Placement, like: torch.Tensor) -> torch.Tensor:
        """The stretch of a tensor that `place` says, of the shape and type of `like`."""
        if self.shapes.get(name) != place.shape:
            raise UserError(
                f"holds {name} as {self.shapes.get(name, 'nothing')}",
                file=str(self.folder),
                field="checkpoint",
                right=f"one of this job's model, in which it is {place.shape}",
            )
        found = torch.empty(like.shape, dtype=like.dtype)
        covered = 0
        for part in self._parts[name]:
            low = [max(a, b) for a, b in zip(part.start, place.start, strict=True)]
            ends = zip(part.start, part.size, place.start, like.shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                source = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, part.start, strict=True))
                target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, place.start, strict=True))
                values = self._file(part.file).get_slice(name)[source]
                if values.dtype != like.dtype:
                    raise UserError(
                        f"{self.folder} holds {name} in {values.dtype}, the job's weights are {like.dtype}",
                        field="dtype",
                        right="the one with which it was trained, or another checkpoint folder",
                    )
                found[target] = values
                covered += values.numel()
        if covered != found.numel():
            raise _damaged(self.folder, f"{name} has holes")
        return found

    def _dtype(self, name: str) -> torch.dtype:
        part = self._parts[name][0]
        dtype: torch.dtype = self._file(part.file).get_slice(name)[tuple(slice(0, 1) for _ in part.start)].dtype
        return dtype

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as problem:
                raise _damaged(self.folder / name, str(problem)) from None
        return self._open[name]


def _write_part(trainer: Trainer, folder: Path) -> None:
    """This rank's file, and a list of its parts beside it."""
    tensors: dict[str, torch.Tensor] = {}
    parts: list[dict[str, Any]] = []
    shapes: dict[str, list[int]] = {}
    file = f"rank-{trainer.transport.rank}.safetensors"
    trained = trainer.trained
    for name, parameter, place in zip(trained.names, trained.parameters, trained.places, strict=True):
        if not trained.writes(name, parameter, place):
            continue
        state: Mapping[str, Any] = trainer.optimizer.state.get(parameter, {})
        values = {name: parameter.detach()}
        if trainer.job.optimizer.name == "adamw":
            values |= {f"{name}/{m}": state.get(m, torch.zeros_like(parameter)) for m in _MOMENTS}
        for each, value in values.items():
            tensors[each] = value.contiguous()
            shapes[each] = list(place.shape)
            parts.append({"name": each, "file": file, "start": list(place.start), "size": list(value.shape)})
    if tensors:
        save_file(tensors, folder / file)
        _sync(folder / file)
        listed = {"parts": parts, "tensors": shapes, "files": {file: _digest(folder / file)}}
        (folder / f"rank-{trainer.transport.rank}.json").write_text(json.dumps(listed), encoding="utf-8")


def _write_index(trainer: Trainer, folder: Path) -> None:
    index: dict[str, Any] = {"format": FORMAT, "step": trainer.step, "job": _bound(trainer)}
    index |= {"plan": str(trainer.plan), "tensors": {}, "parts": [], "files": {}}
    for listed in sorted(folder.glob("rank-*.json")):
        one = json.loads(listed.read_text(encoding="utf-8"))
        index["parts"] += one["parts"]
        index["tensors"] |= one["tensors"]
        index["files"] |= one["files"]
        listed.unlink()
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    _sync(folder / "index.json")


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "index.json"
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = index["format"] == FORMAT and isinstance(index["step"], int) and isinstance(index["parts"], list)
        rows = all(
            len(row["start"]) == len(row["size"]) and row["name"] in index["tensors"] and row["file"] in index["files"]
            for row in index["parts"]
        )
        if not known or not rows or not isinstance(index["files"], dict) or not isinstance(index["job"], dict):
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise _damaged(file, str(problem)) from None
    return index


def _bound(trainer: Trainer) -> dict[str, Any]:
    """What decides, beside the weights, what they mean and what the next steps see and draw, by the job's field."""
    job = trainer.job
    found: dict[str, Any] = {field: getattr(job, field) for field in ("seed", "sequence", "global_batch", "held_out")}
    found["optimizer.name"] = job.optimizer.name
    if job.adapters is not None:
        rank, alpha, targets = job.adapters.rank, job.adapters.alpha, sorted(job.adapters.targets)
        found |= {"model": job.model, "adapters.rank": rank, "adapters.alpha": alpha, "adapters.targets": targets}
    shape = "model" if job.shape is None else "shape"
    found |= {f"{shape}.{name}": value for name, value in asdict(trainer.spec).items()}
    found["data"] = f"text of digest {trainer.data.digest}"
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _drop_unfinished(folder: Path) -> None:
    """Remove what a run left that was killed while it wrote."""
    for part in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(part, ignore_errors=True)


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"is damaged: {why}", file=str(file), right="name another checkpoint, or remove this one")


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as problem:
        raise _damaged(file, str(problem)) from None


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _drop_old(folder: Path, keep: int) -> None:
    found = [each for each in folder.glob("step-*") if each.name[5:].isdigit()]
    for old in sorted(found, key=lambda each: int(each.name[5:]))[:-keep]:
        shutil.rmtree(old)
