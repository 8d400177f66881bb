"""One model over several processes: tensor parallelism, as Megatron-LM splits a layer (arXiv:1909.08053).

A rank holds some KV groups (a KV head with the query heads that read it), a stretch of the MLP's inner width and
a stretch of the vocabulary. Each half of a layer then needs one sum over the ranks, and each pass one gathering of
logits. torch's gloo moves the bytes over the loopback interface. The sums are taken here, in the order of the
ranks: every rank holds the same bits, whatever the number of rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from stretto.core.errors import UserError, require
from stretto.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

_SUM, _GATHER = 0, 1


class Transfer(Protocol):
    """A message under way."""

    def wait(self) -> bool:
        """Return when it has been sent, or has arrived; RuntimeError if it never will be."""


class Group(Protocol):
    """The ranks' point-to-point messages, as torch's process groups have them: one tensor a call, contiguous."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Transfer: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Transfer: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One rank's part of a model, and the way to the other ranks; made by `join`.

    Every rank makes the same calls of `reduce_` and `gather` in the same order. A rank that is gone ends them with a
    RuntimeError, as does one that stays silent for the time given to `join`.

    Attributes:
        rank, world: the number of this rank, from 0, and how many there are.
        group: moves tensors between the ranks.
    """

    rank: int
    world: int
    group: Group

    def __post_init__(self) -> None:
        require(self.world >= 1, "world", self.world, "at least 1")
        require(0 <= self.rank < self.world, "rank", self.rank, f"from 0 to {self.world - 1}")

    @classmethod
    def join(cls, *, rank: int, world: int, rendezvous: Path, timeout_s: float) -> Shard:
        """Meet the other ranks of this machine; returns when all are there.

        Args:
            rendezvous: a file in a folder of this user alone, which does not exist before; the same for all ranks.
            timeout_s: how long to wait for another rank, here and in each collective.

        Raises:
            RuntimeError: a rank did not come.
        """
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]

        timeout = timedelta(seconds=timeout_s)
        store = FileStore(str(rendezvous), world)
        store.set_timeout(timeout)
        group = cast(Group, ProcessGroupGloo(store, rank, world, timeout))
        return cls(rank=rank, world=world, group=group)

    def share(self, units: int, rank: int | None = None) -> range:
        """Which of so many units `rank` (this one if None) holds: neighbours; if uneven, the first ranks one more."""
        rank = self.rank if rank is None else rank
        each, over = divmod(units, self.world)
        start = rank * each + min(rank, over)
        return range(start, start + each + (rank < over))

    def part(self, spec: ModelSpec) -> ModelSpec:
        """`spec` with this rank's heads, MLP width and vocabulary; `UserError` if a rank would go without."""
        if self.world > spec.kv_heads:
            raise UserError(
                f"is {self.world}, but the model has {spec.kv_heads} KV heads",
                field="tp",
                right=f"from 1 to {spec.kv_heads}, as each rank needs a KV head",
            )
        groups = len(self.share(spec.kv_heads))
        return replace(
            spec,
            heads=groups * (spec.heads // spec.kv_heads),
            kv_heads=groups,
            ffn=len(self.share(spec.ffn)),
            vocab=len(self.share(spec.vocab)),
        )

    def cut(self, whole: torch.Tensor, units: int, dim: int = 0) -> torch.Tensor:
        """A copy of this rank's share of `whole` along `dim`, which holds `units` units of equal width."""
        import torch

        width = whole.shape[dim] // units
        mine = self.share(units)
        part = whole.narrow(dim, mine.start * width, len(mine) * width)
        return part.clone(memory_format=torch.contiguous_format)

    def reduce_(self, partial: torch.Tensor) -> torch.Tensor:
        """Replace `partial`, contiguous fp32 of any shape, by its sum over the ranks; returns it."""
        import torch

        # Each rank sends its part to each other and adds up itself: for two ranks that is the least traffic there is.
        # Between the products of a decode pass a sum takes 0.6 ms so, most of it waking threads, where gloo's own
        # allgather takes 0.7 and its allreduce 1.0 (8 rows of 576, two ranks on two CPUs).
        parts = [partial if rank == self.rank else torch.empty_like(partial) for rank in range(self.world)]
        others = [rank for rank in range(self.world) if rank != self.rank]
        receiving = [self.group.recv([parts[rank]], rank, _SUM) for rank in others]
        sending = [self.group.send([partial], rank, _SUM) for rank in others]
        for transfer in (*receiving, *sending):
            transfer.wait()
        total = parts[0]
        for part in parts[1:]:
            total.add_(part)
        return partial.copy_(total)

    def gather(self, logits: torch.Tensor, vocab: int) -> torch.Tensor:
        """Join the ranks' logits [rows, own share of `vocab`]: [rows, vocab] on rank 0, its own part on any other."""
        import torch

        if self.rank:
            self.group.send([logits], 0, _GATHER).wait()
            return logits
        shares = [len(self.share(vocab, rank)) for rank in range(self.world)]
        parts = [logits, *(logits.new_empty(len(logits), width) for width in shares[1:])]
        receiving = [self.group.recv([parts[rank]], rank, _GATHER) for rank in range(1, self.world)]
        for transfer in receiving:
            transfer.wait()
        return torch.cat(parts, dim=1)
