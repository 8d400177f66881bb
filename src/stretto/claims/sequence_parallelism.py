"""What "Sequence Parallelism" (2021, ring self-attention) states of traffic, memory, batch and length.

Bytes and the largest tensors are counted while this package's own operators run on one of N places whose messages go
nowhere. Times and the largest batches come from the publication's formulas: activations of a layer are
(10 B L H + B Z L^2) / N elements with the sequence split, and (8 B L H + B Z L^2) / N + 2 B L H with heads split;
either layer has 48 H^2 elements of weights, gradients and moments, which only tensor parallelism divides. The bytes
that an element really takes are fitted on the weak-scaling table's first row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from stretto.claims.registry import Figure, claim

if TYPE_CHECKING:
    from stretto.comm.transport import Axis, Message

LAYERS, HIDDEN, HEADS, VOCABULARY, POSITIONS = 12, 768, 12, 30522, 512
_CARD = 16e9
_NETWORK = 10e9
_FIRST_MB, _FIRST_TOKENS_S, _FIRST_BATCH, _LENGTH = 8477.5, 9261.0, 64, 512
CONSTANTS = {
    "bytes of an element": "fitted on the memory of one device in the weak-scaling table",
    "P100 16 GB": "NVIDIA P100 data sheet (2016)",
    "weights, gradients, moments": "16 bytes a weight, the publication's count",
}
WEAK = {
    "seconds of one device": "the first row of the table",
    "network": "about 10 GB/s a node, the Cray XC50's Aries network",
}
ROWS = ((2, 128, 13938.0), (4, 256, 21270.0), (8, 512, 26402.0))


@dataclass
class _Counting:
    """A line whose messages go nowhere and are counted."""

    bytes: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def post(
        self, kind: str, axis: Axis, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> Callable[[], None]:
        self.bytes += sum(message.tensor.nbytes for message in sends)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        return lambda: None


def attention_counts(mode: str, places: int, length: int, batch: int = 1, width: int = 8) -> tuple[int, int, int]:
    """Bytes sent, the largest tensor's elements, and the most bytes alive, of forward and backward on place 0.

    `batch` sequences of `length` tokens over `places`, one head of `width`, fp32.
    """
    import torch

    from stretto.comm.transport import Axis
    from stretto.models.parallel.sequence import seq_attention
    from stretto.train.live import LiveBytes

    class Largest(LiveBytes):
        most = 0

        def _note(self, tensor: torch.Tensor, *, outside: bool) -> None:
            if not outside:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
            super()._note(tensor, outside=outside)

    line: Any = _Counting()
    axis = Axis("cp", tuple(range(places)), 0, line)
    q, k, v = (torch.randn(batch, 1, length // places, width, requires_grad=True) for _ in range(3))
    live = Largest()
    with live:
        out = seq_attention(q, k, v, axis, causal=False, mode=mode)  # type: ignore[arg-type]
        out.sum().backward()
    return line.bytes, live.most, live.peak


@claim(
    system="ring-attention",
    says="a layer's 8 (N - 1) B L H / N elements of traffic become 6 (N - 1) B L H / N where gradients ride home",
    kind="exact",
    published=None,
    setting="both modes, N in 2, 3, 4, 8, forward and backward, counted",
)
def traffic(quick: bool) -> Figure:
    found = []
    for places in (2, 3, 4, 8):
        for mode in ("rsa", "blockwise"):
            length = 24 * places
            sent, _, _ = attention_counts(mode, places, length)
            found.append(sent == 6 * (places - 1) * length * 8 * 4 // places)
    return Figure(ours=all(found), note=f"{sum(found)} of {len(found)} equal")


@claim(
    system="ring-attention",
    says="a rank's largest tensor is its own rows of scores, L / N by L, and none is of the whole sequence's width",
    kind="exact",
    published=None,
    setting="RSA, N in 2, 4, 8, L = 512",
)
def rows_of_scores(quick: bool) -> Figure:
    return Figure(ours=all(attention_counts("rsa", n, 512)[1] == 512 // n * 512 for n in (2, 4, 8)))


@claim(
    system="ring-attention",
    says="blockwise, memory grows with L / N alone: twice the length on twice the places takes no more",
    kind="exact",
    published=None,
    setting="blockwise, N from 4 to 8 and L from 4096 to 8192",
)
def blockwise_memory(quick: bool) -> Figure:
    few, many = (attention_counts("blockwise", n, length)[2] for n, length in ((4, 4096), (8, 8192)))
    return Figure(ours=many <= few * 1.01, note=f"{few / 1e6:.2f} MB and {many / 1e6:.2f} MB")


def _weights() -> float:
    """Bytes of what a device holds beside activations, whole."""
    return LAYERS * 48 * HIDDEN**2 * 4.0 + 16.0 * (VOCABULARY + POSITIONS) * HIDDEN


def _sequence_elements(batch: float, length: float, places: int) -> float:
    return LAYERS * (10 * batch * length * HIDDEN + batch * HEADS * length**2) / places


def _tensor_elements(batch: float, length: float, places: int) -> float:
    split = (8 * batch * length * HIDDEN + batch * HEADS * length**2) / places
    return LAYERS * (split + 2 * batch * length * HIDDEN)


@lru_cache(maxsize=1)
def _element_bytes() -> float:
    return (_FIRST_MB * 1e6 - _weights()) / _sequence_elements(_FIRST_BATCH, _LENGTH, 1)


def _largest(used: Callable[[float], float], room: float) -> float:
    """Where an increasing count of elements fills the room."""
    low, high = 1.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) * _element_bytes() <= room else (low, middle)
    return low


@claim(
    system="ring-attention",
    says="64 devices take a batch 13.7 times that of tensor parallelism, which ends at 12 heads",
    kind="simulated",
    published=13.7,
    setting="BERT Base on P100 16 GB, sequences of 512",
    constants=CONSTANTS,
    tolerance=0.1,
)
def batch(quick: bool) -> Figure:
    rooms = _CARD - _weights(), _CARD - _weights() / HEADS
    split = _largest(lambda b: _sequence_elements(b, _LENGTH, 64), rooms[0])
    tensor = _largest(lambda b: _tensor_elements(b, _LENGTH, HEADS), rooms[1])
    kept = rooms[0] * _kept(HEADS) / (rooms[1] * _kept(64, whole=0.0))
    note = f"null: the ratio of the devices; by what a framework keeps of each operation {kept:.1f}"
    return Figure(ours=split / tensor, null=64 / HEADS, note=note)


def _kept(places: int, whole: float = 4.5) -> float:
    """Elements that a layer keeps of a token until its backward pass, in fp32 with masks of a byte: 16.5 H + 2.25 Z L,
    of which tensor parallelism splits all but 4.5 H about layer norms, inputs and dropouts (Korthikanti et al., 2022).
    """
    return whole * HIDDEN + ((16.5 - whole) * HIDDEN + 2.25 * HEADS * _LENGTH) / places


@claim(
    system="ring-attention",
    says="64 devices take sequences 3.0 times as long as tensor parallelism, which ends at 12 heads",
    kind="simulated",
    published=3.0,
    setting="BERT Base on P100 16 GB, 64 sequences",
    constants=CONSTANTS,
    tolerance=0.1,
)
def length(quick: bool) -> Figure:
    split = _largest(lambda tokens: _sequence_elements(64, tokens, 64), _CARD - _weights())
    tensor = _largest(lambda tokens: _tensor_elements(64, tokens, HEADS), _CARD - _weights() / HEADS)
    null = (64 / HEADS) ** 0.5
    return Figure(ours=split / tensor, null=null, note="null: the root of the devices' ratio, as scores grow with L^2")


def _weak(places: int, batch: int) -> Callable[[bool], Figure]:
    def compute(quick: bool) -> Figure:
        tokens = batch * _LENGTH
        alone_s = _FIRST_BATCH * _LENGTH / _FIRST_TOKENS_S
        traffic_s = LAYERS * 8 * (places - 1) * tokens * HIDDEN / places * 4.0 / _NETWORK
        note = "null: as many times the first row"
        return Figure(ours=tokens / (alone_s + traffic_s), null=places * _FIRST_TOKENS_S, note=note)

    compute.__name__ = f"weak_scaling_{places}"
    return compute


@claim(
    system="ring-attention",
    says="8 devices with 4 times the batch hold 1.0014 times as much each as 2 devices",
    kind="simulated",
    published=8490.8 / 8478.8,
    setting="sequences of 512, heads 64 wide; RSA's attention, forward and backward, counted",
    constants={"bytes": "counted while this package's operators run"},
    tolerance=0.1,
    doubtful=True,
)
def weak_scaling_memory(quick: bool) -> Figure:
    two, eight = (attention_counts("rsa", places, _LENGTH, batch=places, width=64)[2] for places in (2, 8))
    few, many = (_tensor_elements(places * _FIRST_BATCH, _LENGTH, places) for places in (2, 8))
    return Figure(ours=eight / two, null=many / few, note="null: activations of tensor parallelism by its formula")


for _places, _batch, _published in ROWS:
    claim(
        system="ring-attention",
        says=f"{_places} devices with a batch of {_batch}: {_published:.0f} tokens/s",
        kind="simulated",
        published=_published,
        unit="tokens/s",
        setting="BERT Base, sequences of 512, 64 sequences a device",
        constants=WEAK,
        tolerance=0.1,
        doubtful=True,
    )(_weak(_places, _batch))
