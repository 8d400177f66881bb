"""The load of a job: read from its trace, or drawn from its seed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from stretto.core.errors import UserError
from stretto.serve.deploy.job import LoadSpec
from stretto.serve.deploy.load import MAX_TOKENS, Floats, Ints, Load
from stretto.serve.deploy.traces import read_trace


@lru_cache(maxsize=8)
def load_of(spec: LoadSpec) -> Load:
    """The requests that `spec` tells of; the same for the same values.

    Raises:
        UserError: if its trace cannot be read.
    """
    if spec.trace is None:
        return _drawn(spec)
    try:
        load = read_trace(spec.trace, most=spec.requests)
    except UserError as problem:
        raise problem.at(field="load.trace") from None
    if spec.rate_per_s is None or len(load) < 2:
        return load
    own = (len(load) - 1) / max(float(load.arrival_s[-1]), 1e-9)
    return replace(load, arrival_s=load.arrival_s * (own / spec.rate_per_s))


def _drawn(spec: LoadSpec) -> Load:
    generator = np.random.default_rng(spec.seed)
    count = spec.requests or 1
    conversations = -(-count // spec.turns)
    rate = (spec.rate_per_s or 1.0) / spec.turns
    if spec.arrivals == "at_once":
        begin = np.zeros(conversations)
    elif spec.arrivals == "even":
        begin = np.arange(conversations) / rate
    else:
        gaps = generator.exponential(1 / rate, conversations)
        begin = np.cumsum(gaps) - gaps[0]
    said = _lengths(generator, spec.prompt_tokens, spec.spread, (conversations, spec.turns))
    answered = _lengths(generator, spec.output_tokens, spec.spread, (conversations, spec.turns))
    before = np.cumsum(said + answered, axis=1) - said - answered
    prompt = np.minimum(before + said, MAX_TOKENS)
    arrival: Floats = begin[:, None] + spec.think_s * np.arange(spec.turns)
    order = np.argsort(arrival.ravel(), kind="stable")[:count]
    # A conversation is one text, of which each prompt is a beginning, so one hash is enough for it.
    prefixes = tuple((int(i),) for i in order // spec.turns) if spec.turns > 1 else ()
    return Load(arrival.ravel()[order], prompt.ravel()[order], answered.ravel()[order], prefixes)


def _lengths(generator: np.random.Generator, mean: int, spread: float, shape: tuple[int, int]) -> Ints:
    """Log-normal lengths of this mean and relative deviation, at least 1."""
    if not spread:
        return np.full(shape, mean, np.int64)
    sigma = np.sqrt(np.log1p(spread**2))
    drawn = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, shape)
    return np.clip(np.rint(drawn), 1, MAX_TOKENS).astype(np.int64)
