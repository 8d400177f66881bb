"""A job as numbers: the model's shape, the lengths of the prompts, the arrivals. All that planning needs, and
no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from stretto.core.errors import UserError
from stretto.models.load import open_model
from stretto.models.packable import why_not_fused
from stretto.models.quantized import PackedTensor
from stretto.models.spec import ModelSpec
from stretto.models.tokenizer import Tokenizer
from stretto.models.weights import StoredTensor
from stretto.serve.job import ServeJob


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a serving job asks of a machine.

    Attributes:
        spec: the model's shape.
        prompts: token ids of each prompt.
        arrivals_s: when each request comes.
        limit: most new tokens of an answer.
        not_packed: why the weights cannot stay packed in the fused decoder; None if they can.
        packed_bytes: of the weights as their file holds them.
    """

    spec: ModelSpec
    prompts: tuple[tuple[int, ...], ...]
    arrivals_s: tuple[float, ...]
    limit: int
    not_packed: str | None = "these weights are not at hand"
    packed_bytes: float = 0.0

    @property
    def longest_prompt(self) -> int:
        return max(map(len, self.prompts))

    @property
    def longest(self) -> int:
        """Positions of the longest request, its whole answer included."""
        return self.longest_prompt + self.limit


@lru_cache(maxsize=8)
def _opened(model: str) -> tuple[ModelSpec, Tokenizer, str | None, float]:
    files = open_model(model)
    stored = (PackedTensor, StoredTensor)
    packed = sum(source.nbytes for source in files.weights.sources.values() if isinstance(source, stored))
    return files.spec, files.tokenizer, why_not_fused(files.spec, files.weights), float(packed)


@lru_cache(maxsize=16)
def workload(job: ServeJob) -> Workload:
    """Tokenise the prompts of `job`, its chat template applied.

    Raises:
        UserError: if the model cannot be found or read, or has no chat template.
    """
    try:
        spec, tokenizer, not_packed, packed_bytes = _opened(job.model)
    except UserError as problem:
        raise problem.at(field="model") from None
    return Workload(
        spec=spec,
        prompts=tuple(tuple(encode(job, tokenizer, prompt)) for prompt in job.prompts),
        arrivals_s=tuple(i * job.arrival_gap_s for i in range(len(job.prompts))),
        limit=job.max_new_tokens,
        not_packed=not_packed,
        packed_bytes=packed_bytes,
    )


def encode(job: ServeJob, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of one prompt, as a user's turn of a chat unless the job says otherwise."""
    if not job.chat:
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": job.system}] if job.system else []
    messages.append({"role": "user", "content": prompt})
    return tokenizer.encode(tokenizer.chat(messages), special=False)
