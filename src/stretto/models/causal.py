"""A decoder of the Llama family that can be trained, cut into stages.

A stage holds neighbouring layers, the first one the embedding and the last one the final norm and the head. Its layers
(`causal_layers`) may be shared by ranks; `causal_weights` fills it.

Shapes: B sequences, L tokens of each that lie here, H hidden, D head width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stretto.models.causal_layers import Experts, Layer, Lora, Norm, Placement, Projection, Skip, Split, Table
from stretto.models.parallel.sequence import positions
from stretto.models.rope import rope_frequencies
from stretto.models.spec import ModelSpec


class _Decoder(nn.Module):
    """What Hugging Face calls `model`: the embedding, the layers by their numbers, the final norm."""

    def __init__(
        self, spec: ModelSpec, layers: range, first: bool, last: bool, split: Split, lora: Lora | None, dropout: float
    ):
        super().__init__()
        self.embed_tokens = Table(spec, split.tp) if first else None
        self.layers = nn.ModuleDict({str(index): Layer(spec, split, lora, index, dropout) for index in layers})
        self.norm = Norm(spec.hidden, spec.norm_eps) if last else None


class CausalStage(nn.Module):
    """Some layers of a model; with all of them, the model.

    Args:
        layers: the numbers of the layers that lie here.
        first, last: whether the embedding, and the norm with the head, lie here too.
        split: the axes that share it.
        lora: adapters, beside which nothing is trained.
        dtype: of the parameters.
        compute: type of the products where it is not that of the parameters ("bf16": under autocast).
        dropout: chance of what attention and MLPs add to the residual stream to be dropped, number by number.

    A head that is tied to the embedding is the same tensor where both lie here, and a copy where they do not: its name
    is `lm_head.weight` then, and the two gradients have to be added.
    """

    frequencies: torch.Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layers: range | None = None,
        *,
        first: bool = True,
        last: bool = True,
        split: Split | None = None,
        lora: Lora | None = None,
        dtype: torch.dtype = torch.float32,
        compute: torch.dtype | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.spec, self.split, self.lora = spec, split or Split(), lora
        self.first, self.last = first, last
        self.compute = compute
        here = range(spec.layers) if layers is None else layers
        self.model = _Decoder(spec, here, first, last, self.split, lora, dropout)
        own_head = last and not (spec.tied_embeddings and first)
        self.lm_head = Table(spec, self.split.tp) if own_head else None
        if dtype != torch.float32:
            self.to(dtype)
        self.register_buffer("frequencies", rope_frequencies(spec).to(dtype), persistent=False)
        self._first_layer = here.start
        self._makes = {made: number for number, (made, _) in enumerate(spec.skip_pairs)}
        self._takes = {taken: number for number, (_, taken) in enumerate(spec.skip_pairs)}
        self._turns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if lora is not None:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def forward(
        self,
        x: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        length: int,
        recompute: bool = False,
        keys: torch.Tensor | None = None,
        skips: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The stage's result.

        Args:
            x: tokens [B, L] where the embedding lies here, else the stage before's result [B, L, H].
            targets: the tokens that come next [B, L], for the last stage; `IGNORED` ones count for nothing.
            length: of the whole sequence, of which `cp` may hold parts.
            recompute: keep the inputs of layers only, and compute the rest again when gradients ask for it.
            keys: int64 [B, L] of the tokens (`dropout.token_keys`), by which numbers are dropped; None: none are.
            skips: by number, the tensors [B, L, H] of skip connections that other stages made and this one takes. It
                takes them out and puts in those that it has for others; the result of the layer just before its first
                one it has as its input.

        Returns:
            [B, L, H]; of the last stage, the sum of the token losses that lie here.
        """
        with torch.autocast("cpu", self.compute, enabled=self.compute is not None):
            if self.model.embed_tokens is not None:
                x = self.model.embed_tokens.embed(x)
            turns = self._turn(length)
            under_way = {} if skips is None else skips
            before = self._makes.get(self._first_layer - 1)
            if before is not None:
                under_way.setdefault(before, x)
            for index, layer in enumerate(self.model.layers.values(), self._first_layer):
                inputs = (x, turns, keys, under_way.pop(self._takes[index]) if index in self._takes else None)
                x = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
                if index in self._makes:
                    under_way[self._makes[index]] = x
            if self.model.norm is None:
                return x
            assert targets is not None
            rows = self.model.norm(x).flatten(0, 1)
            return self.head.losses(rows, targets.flatten()).sum()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of what goes from stage to stage."""
        return self.frequencies.dtype

    @property
    def head(self) -> Table:
        """The output projection of the last stage."""
        found = self.lm_head or self.model.embed_tokens
        assert found is not None
        return found

    @property
    def tied_pair(self) -> nn.Parameter | None:
        """The tensor whose other copy lies on another stage, if this is the first or the last of several."""
        if not self.spec.tied_embeddings or self.first == self.last:
            return None
        table = self.model.embed_tokens if self.first else self.lm_head
        assert table is not None
        return table.weight

    def placements(self) -> dict[str, Placement]:
        """The place of every parameter, by its name, in the order of `named_parameters`."""
        found = {
            f"{path}.{name}": place
            for path, module in self.named_modules()
            if isinstance(module, Projection | Norm | Table | Experts | Skip)
            for name, place in module.placements()
        }
        return {name: found[name] for name, _ in self.named_parameters()}

    def _turn(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotary angles of the tokens that lie here, [L, D]."""
        if length not in self._turns:
            where = positions(length, self.split.cp, self.split.layout).to(self.frequencies.dtype)
            angles = where[:, None] * torch.cat([self.frequencies, self.frequencies])
            self._turns[length] = (angles.cos(), angles.sin())
        return self._turns[length]
