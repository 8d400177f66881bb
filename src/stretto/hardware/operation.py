"""One operation of a computation, as a cost model sees it: how much work of what kind, and nothing about seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A unit of work that runs on one device.

    Attributes:
        name: what it does in its model, e.g. "qkv" or "mlp_down"; the phase under which it is timed.
        kind: its kernel kind: "matmul", "attention", "norm", "elementwise", "gather" or "host".
        dtype: the type of the arithmetic: "fp32", "bf16", "fp16", "fp8" or "int8".
        flops: floating-point (or integer) operations, a multiply-add counting two.
        bytes: bytes read and written when nothing is cached.
        shape: for "matmul" (rows m, inner k, columns n); for "attention" (query tokens, query heads, KV heads,
            head dim, query-key pairs); else (elements,).
        signature: what a measured table of this very operation is filed under, without the axes that vary.
        at: the coordinates on that table's axes, e.g. (rows,) or (rows, mean context).
        count: how many times in a row it runs (layers that are alike).
    """

    name: str
    kind: str
    dtype: str
    flops: float
    bytes: float
    shape: tuple[int, ...] = ()
    signature: str = ""
    at: tuple[float, ...] = ()
    count: int = 1

    def __post_init__(self) -> None:
        if self.flops < 0 or self.bytes < 0 or self.count < 0:
            raise ValueError(
                f"operation {self.name}: flops {self.flops}, bytes {self.bytes} and count {self.count} "
                "must not be negative"
            )
