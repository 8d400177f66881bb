"""What ranks say to each other, over torch.distributed's point-to-point messages: counted, timed, and summed in the
order of the ranks.

A collective is a round of messages in which each rank sends to each other what is for it, all posted before any is
waited for, so nothing deadlocks however large it is. Sums are taken in the order of the ranks, so that every rank, and
every run, has the same bits. The bytes are those of the best ring: an all-reduce of S bytes over n ranks sends
2 (n - 1) / n of S from each.

A rank that is gone or silent ends each call that needs it in a `RankLost` within the time limit.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from stretto.comm.grid import RankGrid
from stretto.comm.meter import Meter
from stretto.core.errors import require
from stretto.core.random import uniform

T = TypeVar("T")
_SMALL_BYTES = 16384
"""Up to here a sum is one round in which each sends all to each: the second round would cost more than its bytes."""


class RankLost(RuntimeError):
    """Another rank is gone, or did not answer in time; the text says who waited for whom, in what."""


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What a rank's messages are made to suffer, to try what a slow link or rank would do.

    Attributes:
        delay_s: a message comes this much later than it was asked for.
        jitter_s: and up to this much more, drawn from `seed`, before each call.
        bytes_per_s: no faster than this.
        silent_after: after so many calls the rank says nothing more; it ends in `RankLost` itself.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = float("inf")
    silent_after: int | None = None
    seed: int = 0


class Pending(Generic[T]):
    """A call under way; `wait` ends it once and for all."""

    def __init__(self, finish: Callable[[], T]):
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        """What came.

        Raises:
            RankLost: a rank that it needs is gone or silent.
        """
        assert self._finish is not None, "a call is waited for once"
        finish, self._finish = self._finish, None
        return finish()


def done(value: T) -> Pending[T]:
    """A call that is over before it began."""
    return Pending(lambda: value)


@dataclass(kw_only=True)
class _Line:
    """This rank's messages to the others, shared by all of its axes."""

    rank: int
    timeout_s: float
    meter: Meter = field(default_factory=Meter)
    disturbance: Disturbance = field(default_factory=Disturbance)
    calls: int = 0

    def post(
        self, kind: str, axis: Axis, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> Callable[[], None]:
        """Begin a round of messages; what is returned waits for its end."""
        self._disturb(kind, axis)
        count = self.meter.of(kind, axis.name)
        count.calls += 1
        count.bytes += sum(message.tensor.nbytes for message in sends)
        begun = time.perf_counter()
        operations = [
            *(dist.P2POp(dist.irecv, message.tensor, message.rank, tag=tag) for message in receives),
            *(dist.P2POp(dist.isend, message.tensor, message.rank, tag=tag) for message in sends),
        ]
        peers = sorted({message.rank for message in (*receives, *sends)})
        works = self._begun(kind, axis, peers, operations)
        largest = max((message.tensor.nbytes for message in receives), default=0)
        earliest = begun + self.disturbance.delay_s + largest / self.disturbance.bytes_per_s if receives else begun

        def finish() -> None:
            before = time.perf_counter()
            for work in works:
                try:
                    work.wait()
                except RuntimeError as problem:
                    raise self._lost(kind, axis, peers, problem) from None
            if earliest > time.perf_counter():
                time.sleep(earliest - time.perf_counter())
            count.seconds += time.perf_counter() - before

        return finish

    def _begun(self, kind: str, axis: Axis, peers: list[int], operations: list[dist.P2POp]) -> list[dist.Work]:
        if not operations:
            return []
        try:
            return list(dist.batch_isend_irecv(operations))
        except RuntimeError as problem:
            raise self._lost(kind, axis, peers, problem) from None

    def _disturb(self, kind: str, axis: Axis) -> None:
        self.calls += 1
        bad = self.disturbance
        if bad.jitter_s:
            time.sleep(bad.jitter_s * float(uniform(bad.seed, self.rank, self.calls)))
        if bad.silent_after is not None and self.calls > bad.silent_after:
            time.sleep(self.timeout_s)
            raise RankLost(f"rank {self.rank} was made to fall silent before {kind} over {axis.name}")

    def _lost(self, kind: str, axis: Axis, peers: list[int], problem: RuntimeError) -> RankLost:
        told = " ".join(str(problem).split())
        named = ", ".join(map(str, peers))
        return RankLost(
            f"rank {self.rank}: {kind} over axis {axis.name} with rank{'s' if len(peers) > 1 else ''} {named} failed "
            f"(limit {self.timeout_s:g} s): {told[:300]}"
        )


@dataclass(frozen=True)
class Message:
    """A contiguous tensor, and the rank that it goes to or comes from."""

    tensor: torch.Tensor
    rank: int


class Line(Protocol):
    """A rank's way to the others."""

    def post(
        self, kind: str, axis: Axis, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> Callable[[], None]:
        """Begin a round of messages; what is returned waits for its end."""


class Axis:
    """The ranks that differ in one axis of the grid, or in some; with one rank every call returns at once.

    Attributes:
        name: of the axis or axes, joined by "+".
        rank, size: this rank's place in it, and how many there are.
        ranks: their numbers in the run.
    """

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, line: Line | None):
        self.name, self.ranks = name, ranks
        self.rank, self.size = ranks.index(rank), len(ranks)
        self.tag = zlib.crc32(name.encode()) % 2**30  # what belongs to different axes never meets
        self._line = line

    def send(self, tensor: torch.Tensor, to: int, *, number: int = 0) -> Pending[torch.Tensor]:
        """Send `tensor` to place `to`; it must stay as it is until `wait`.

        Messages with different numbers (below 2**20) may be received in any order.
        """
        whole = tensor.contiguous()
        finish = self._post("send", [(whole, to)], [], number)
        return Pending(lambda: (finish(), whole)[1])

    def receive(self, like: torch.Tensor, source: int, *, number: int = 0) -> Pending[torch.Tensor]:
        """A new tensor of the shape and type of `like` from place `source`."""
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        finish = self._post("receive", [], [(buffer, source)], number)
        return Pending(lambda: (finish(), buffer)[1])

    def exchange(self, tensors: Sequence[torch.Tensor], *, to: int, source: int) -> Pending[list[torch.Tensor]]:
        """Send `tensors` to one place and receive as many of the same shapes from another, both at once."""
        if self.size == 1:
            return done(list(tensors))
        whole = [tensor.contiguous() for tensor in tensors]
        buffers = [torch.empty_like(tensor) for tensor in whole]
        finish = self._post("exchange", [(t, to) for t in whole], [(b, source) for b in buffers])
        return Pending(lambda: (finish(), buffers, whole)[1])

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor`, the same shape on every rank, by its sum over them, in their order; returns it."""
        if self.size == 1:
            return tensor
        flat = tensor.contiguous().view(-1)
        if self.size == 2 or flat.nbytes <= _SMALL_BYTES:
            total = _sum(self._everyones("all_reduce", flat))
        else:
            sizes = _slices(flat.numel(), self.size)
            own = self._scattered("all_reduce", flat, sizes)
            total = torch.cat(self._gathered("all_reduce", own, [own.new_empty(size) for size in sizes]))
        return tensor.copy_(total.view(tensor.shape))

    def maximum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its greatest elements over the ranks; returns it."""
        if self.size == 1:
            return tensor
        parts = self._everyones("maximum", tensor.contiguous().view(-1))
        return tensor.copy_(torch.stack(parts).amax(0).view(tensor.shape))

    def all_gather(self, tensor: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """The ranks' tensors joined along `dim`, in which they may have different `sizes`."""
        if self.size == 1:
            return tensor
        own = tensor.movedim(dim, 0).contiguous()
        lengths = sizes or [len(own)] * self.size
        require(lengths[self.rank] == len(own), "sizes", lengths, f"{len(own)} for place {self.rank}")
        parts = self._gathered("all_gather", own, [own.new_empty(n, *own.shape[1:]) for n in lengths])
        return torch.cat(parts).movedim(0, dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """This rank's slice along `dim` of the sum over the ranks, in their order; slices of `sizes`, else alike."""
        if self.size == 1:
            return tensor
        whole = tensor.movedim(dim, 0).contiguous()
        lengths = list(sizes) if sizes else _slices(len(whole), self.size)
        require(sum(lengths) == len(whole), "sizes", lengths, f"{len(whole)} in all")
        return self._scattered("reduce_scatter", whole, lengths).movedim(0, dim)

    def all_to_all(self, tensor: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Deal out rows of dim 0: `send` of them to each place in turn; returns what came, in the places' order."""
        if self.size == 1:
            return tensor
        outgoing = list(tensor.contiguous().split(list(send)))
        whole = tensor.new_empty(sum(receive), *tensor.shape[1:])
        incoming = whole.split(list(receive))
        require(len(outgoing[self.rank]) == receive[self.rank], "receive", receive, f"as {send} for place {self.rank}")
        incoming[self.rank].copy_(outgoing[self.rank])
        self._post(
            "all_to_all",
            [(part, to) for to, part in enumerate(outgoing) if to != self.rank],
            [(part, source) for source, part in enumerate(incoming) if source != self.rank],
        )()
        return whole

    def broadcast_(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Replace `tensor` by that of place `root`; returns it."""
        if self.size == 1:
            return tensor
        whole = tensor.contiguous()
        others = [place for place in range(self.size) if place != root]
        sends = [(whole, place) for place in others] if self.rank == root else []
        self._post("broadcast", sends, [] if self.rank == root else [(whole, root)])()
        return tensor.copy_(whole)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            self._everyones("barrier", torch.zeros(1, dtype=torch.uint8))

    def apart(self, name: str) -> Axis:
        """The same ranks on a line of their own: its messages may overtake those of this axis."""
        return Axis(f"{self.name} ({name})", self.ranks, self.ranks[self.rank], self._line)

    def _everyones(self, kind: str, flat: torch.Tensor) -> list[torch.Tensor]:
        return self._gathered(kind, flat, [flat if place == self.rank else torch.empty_like(flat) for place in self])

    def _gathered(self, kind: str, own: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each rank's `own` in the places of `parts`."""
        others = [place for place in range(self.size) if place != self.rank]
        self._post(kind, [(own, place) for place in others], [(parts[place], place) for place in others])()
        parts[self.rank] = own
        return parts

    def _scattered(self, kind: str, whole: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """The own slice of the sum of all ranks' `whole`."""
        slices = whole.split(list(sizes))
        parts = [slices[self.rank] if place == self.rank else torch.empty_like(slices[self.rank]) for place in self]
        others = [place for place in self if place != self.rank]
        self._post(kind, [(slices[place], place) for place in others], [(parts[place], place) for place in others])()
        return _sum(parts)

    def __iter__(self) -> Any:
        return iter(range(self.size))

    def _post(
        self,
        kind: str,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        number: int = 0,
    ) -> Callable[[], None]:
        assert self._line is not None, f"axis {self.name} has no other ranks"
        outgoing, incoming = (
            [Message(tensor, self.ranks[place]) for tensor, place in each if tensor.numel()]
            for each in (sends, receives)
        )
        return self._line.post(kind, self, outgoing, incoming, self.tag + number)


def alone(name: str = "alone") -> Axis:
    """An axis of one rank."""
    return Axis(name, (0,), 0, None)


class Transport:
    """One rank's way to the others of a run; made by `start`, ended by `close`.

    Every rank makes the same calls over an axis in the same order. `axis` may be called at any time and by some ranks
    only: messages tell axes apart by their names and need no groups of their own.
    """

    def __init__(self, grid: RankGrid, rank: int, line: _Line):
        self.grid, self.rank = grid, rank
        self._line = line
        self._axes: dict[tuple[str, ...], Axis] = {}

    @classmethod
    def start(
        cls,
        grid: RankGrid,
        *,
        rank: int,
        timeout_s: float,
        store: Path | None = None,
        disturbance: Disturbance | None = None,
    ) -> Transport:
        """Meet the other ranks; returns when all are there.

        Args:
            rank: this one's number.
            timeout_s: how long to wait for another rank, here and in every call.
            store: a file in a folder of this user alone, the same for all ranks of one machine, that does not exist
                before; None takes MASTER_ADDR and MASTER_PORT, as torchrun sets them.

        Raises:
            RankLost: a rank did not come.
        """
        line = _Line(rank=rank, timeout_s=timeout_s, disturbance=disturbance or Disturbance())
        if grid.world > 1 and not dist.is_initialized():
            limit = timedelta(seconds=timeout_s)
            how: dict[str, Any] = {"init_method": "env://"}
            if store is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                how = {"store": dist.FileStore(str(store), grid.world)}  # type: ignore[attr-defined]
            try:
                dist.init_process_group("gloo", rank=rank, world_size=grid.world, timeout=limit, **how)
            except RuntimeError as problem:
                told = " ".join(str(problem).split())[:300]
                raise RankLost(f"rank {rank} did not meet the other {grid.world - 1} ranks: {told}") from None
        return cls(grid, rank, line)

    @property
    def meter(self) -> Meter:
        return self._line.meter

    def axis(self, *names: str) -> Axis:
        """The ranks that differ from this one in these axes alone."""
        if names not in self._axes:
            self._axes[names] = Axis("+".join(names), self.grid.group(self.rank, *names), self.rank, self._line)
        return self._axes[names]

    def close(self) -> None:
        """Leave the others."""
        if self.grid.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _slices(length: int, count: int) -> list[int]:
    each, over = divmod(length, count)
    return [each + (place < over) for place in range(count)]
