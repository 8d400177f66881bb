"""Prometheus metrics under vLLM's names, with the prefix `stretto:`, so that a dashboard moves by one replacement."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from stretto.serve.handle import Handle

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
REASONS = ("stop", "length", "abort", "error", "deadline")
_REASON = {"cancelled": "abort", "failed": "error", "grammar": "error"}


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._queried = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hit = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_S)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens.", _BETWEEN_TOKENS_S)
        self._request = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_S)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first pass.", _REQUEST_S)
        name, text = "stretto:request_success", "Requests that ended, by their reason."
        counter = Counter(name, text, ["model_name", "finished_reason"], registry=self._registry)
        self._finished = {reason: counter.labels(model, reason) for reason in REASONS}

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that asks `value` whenever it is read."""
        gauge = Gauge(f"stretto:{name}", text, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(value)

    def ended(self, handle: Handle) -> None:
        """Count one answer; one that was cancelled or failed counts by its reason alone."""
        reason = handle.reason or "failed"
        self._finished[_REASON.get(reason, reason)].inc()
        if handle.started_s is None or reason not in ("stop", "length"):
            return
        self._queried.inc(len(handle.request.prompt))
        self._hit.inc(handle.cached_tokens)
        self._queue.observe(handle.started_s - handle.arrived_s)
        self._first_token.observe(handle.times_s[0] - handle.arrived_s)
        for before, after in zip(handle.times_s, handle.times_s[1:], strict=False):
            self._between.observe(after - before)
        self._request.observe(handle.finished_s - handle.arrived_s)

    def text(self) -> bytes:
        """All metrics in Prometheus' text form."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"stretto:{name}", text, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"stretto:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)
