"""What can be asked of the training domain: a model trained or finetuned on text, with an objective and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stretto.core.errors import FieldError, require
from stretto.core.orders import ORDERS
from stretto.models.spec import ModelSpec

_MOST_DROPOUT = 0.9
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _require_chance(dropout: float) -> None:
    require(0 <= dropout <= _MOST_DROPOUT, "dropout", dropout, f"in [0, {_MOST_DROPOUT}]")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-shaped model to be trained from scratch.

    Attributes:
        layers, hidden, heads, kv_heads, ffn: as in `ModelSpec`.
        head_dim: None: hidden / heads.
        experts, top_k: experts of each MLP, and how many of them a token goes to; 0: a dense model.
        tied_embeddings: the head is the embedding's table.
        dropout: chance of what attention and MLPs add to the residual stream to be dropped in training (0 .. 0.9).
        skips: "unet": results of the first half's layers are added to what enters the second half's, see `ModelSpec`.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int | None = None
    experts: int = 0
    top_k: int = 0
    tied_embeddings: bool = True
    dropout: float = 0.0
    skips: Literal["none", "unet"] = "none"

    def __post_init__(self) -> None:
        _require_chance(self.dropout)
        require(self.skips == "none" or self.layers >= 2, "layers", self.layers, "at least 2 for skip connections")
        self.spec(vocab=2, positions=2)

    def spec(self, *, vocab: int, positions: int) -> ModelSpec:
        """The model with a vocabulary and the longest sequence."""
        return ModelSpec(
            family="llama",
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim or self.hidden // max(self.heads, 1),
            ffn=self.ffn,
            vocab=vocab,
            tied_embeddings=self.tied_embeddings,
            max_positions=positions,
            experts=self.experts,
            top_k=self.top_k,
            skips=self.skips,
        )


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters (LoRA), beside which nothing is trained.

    Attributes:
        rank: of each.
        alpha: scale of their outputs, over the rank.
        targets: which projections get one.
        dropout: chance of each number that enters one to be dropped in training (0 .. 0.9).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 4096, "rank", self.rank, "in 1 .. 4096")
        require(self.alpha > 0, "alpha", self.alpha, "positive")
        _require_chance(self.dropout)
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        require(bool(self.targets) and not unknown, "targets", list(self.targets), f"of {', '.join(PROJECTIONS)}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights follow gradients.

    Attributes:
        name: "adamw" or "sgd".
        learning_rate: the highest.
        warmup_steps: it rises to that over so many steps.
        decay: after which it stays ("constant"), or falls over the rest of the job to a tenth ("linear", "cosine").
        betas, eps, weight_decay: of AdamW; matrices alone decay.
        clip_norm: gradients longer than this are scaled down to it; None: never.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        require(0 < self.learning_rate < 100, "learning_rate", self.learning_rate, "positive")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "not negative")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(0 < self.eps < 1, "eps", self.eps, "in (0, 1)")
        require(0 <= self.weight_decay < 1, "weight_decay", self.weight_decay, "in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "positive, or left out")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Choices that a job makes itself; what is left out is weighed.

    Attributes:
        dp, ep, pp, cp, tp: ranks of the data, expert, pipeline, sequence and tensor axis.
        schedule: the pipeline's order.
        chunks: stages a pipeline rank.
        micro_batch: sequences of one pass.
        attention, cp_layout, experts: as in a plan; left out, blockwise rings, zigzag where the sequence divides, and
            lent experts, which are not weighed against the others.
    """

    dp: int | None = None
    ep: int | None = None
    pp: int | None = None
    cp: int | None = None
    tp: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    micro_batch: int | None = None
    attention: Literal["blockwise", "rsa", "all_to_all"] | None = None
    cp_layout: Literal["contiguous", "zigzag"] | None = None
    experts: Literal["llep", "ep"] | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "ep", "pp", "cp", "tp", "chunks", "micro_batch"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 65536, name, value, "in 1 .. 65536")
        known = (None, *ORDERS)
        require(self.schedule in known, "schedule", self.schedule, f"one of {', '.join(ORDERS)}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep to; None means no limit.

    Attributes:
        memory_gb: most memory of a rank, in units of 1e9 bytes; None: what its device has.
        seconds: the run ends after this long, at the end of a step.
    """

    memory_gb: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory_gb", "seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "> 0")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train a model on text.

    Attributes:
        model: the model to finetune: a name, a path or a Hugging Face id, as for serving; or
        shape: a new one.
        data: "python-reference" (the language reference that Python carries), paths of text files, or
            "hub:NAME[:SPLIT]" for a Hugging Face data set with a text column.
        tokenizer: "model" takes the model's (of the default model for a new one), "bytes" one token a byte.
        sequence: tokens of a sequence.
        global_batch: sequences of a step, however many ranks share them.
        steps: of the optimizer.
        dtype: of the products; weights and sums stay in fp32 with "bf16".
        recompute: whether activations are computed again in backward; "auto" weighs both.
        processes: ranks on this machine or devices of the cluster; None weighs one and all.
        evaluate_every, save_every: steps; None: only at the beginning and at the end, and only at the end.
        held_out: share of the sequences that are kept for evaluation.
        checkpoint: folder of checkpoints; a job goes on from the newest one there.
        keep: how many checkpoints stay.
        export: a new folder for the trained model in Hugging Face's form.
        timeout_s: how long a rank waits for another before it gives up.
        seed: of the order of the sequences, of a new model, and of what is dropped.
    """

    kind: Literal["train"] = "train"
    model: str | None = None
    shape: Shape | None = None
    data: tuple[str, ...] = ("python-reference",)
    tokenizer: Literal["model", "bytes"] = "model"
    sequence: int = 256
    global_batch: int = 8
    steps: int = 20
    optimizer: Optimizer = field(default_factory=Optimizer)
    adapters: Adapters | None = None
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    recompute: Literal["auto", "never", "always"] = "auto"
    processes: int | None = None
    layout: Layout = field(default_factory=Layout)
    evaluate_every: int | None = None
    held_out: float = 0.02
    save_every: int | None = None
    checkpoint: str | None = None
    keep: int = 2
    export: str | None = None
    timeout_s: float = 60.0
    seed: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise FieldError("model", self.model, "given where `shape` is not: one of the two")
        require(self.shape is None or self.adapters is None, "adapters", self.adapters, "left out for a new model")
        require(self.model is None or self.tokenizer == "model", "tokenizer", self.tokenizer, "model, to finetune one")
        require(bool(self.data), "data", self.data, "at least one source of text")
        require(8 <= self.sequence <= 2**20, "sequence", self.sequence, "in 8 .. 2**20 tokens")
        require(1 <= self.global_batch <= 2**20, "global_batch", self.global_batch, "in 1 .. 2**20 sequences")
        require(1 <= self.steps <= 10**8, "steps", self.steps, "in 1 .. 10**8")
        require(self.processes is None or 1 <= self.processes <= 65536, "processes", self.processes, "in 1 .. 65536")
        for name in ("evaluate_every", "save_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1 step, or left out")
        require(self.save_every is None or self.checkpoint is not None, "checkpoint", None, "a folder, to save into")
        require(self.export is None or self.checkpoint is not None, "checkpoint", None, "a folder, to export from")
        if self.export is not None and self.shape is not None and self.shape.skips != "none":
            raise FieldError(
                "export", self.export, "left out with `shape.skips`: Hugging Face has no decoder with skip connections"
            )
        require(0 <= self.held_out < 0.5, "held_out", self.held_out, "in [0, 0.5)")
        require(1 <= self.keep <= 1000, "keep", self.keep, "in 1 .. 1000")
        require(1 <= self.timeout_s <= 86400, "timeout_s", self.timeout_s, "in 1 .. 86400 seconds")

    @property
    def drops(self) -> bool:
        """Whether anything is dropped by chance."""
        return any(each is not None and each.dropout > 0 for each in (self.shape, self.adapters))
