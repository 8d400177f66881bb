"""What the engine takes where a user says "auto"."""

from __future__ import annotations

import pytest

from stretto.serve import settings
from stretto.serve.settings import EngineSettings


@pytest.mark.parametrize(
    ("flags", "asked", "taken"),
    [
        (set(), {}, ("bf16", "bf16")),
        ({"avx512_bf16"}, {}, ("bf16", "bf16")),
        (set(), {"dtype": "fp32"}, ("fp32", "exact")),
        ({"amx_bf16"}, {"dtype": "fp32"}, ("fp32", "exact")),
        (set(), {"dtype": "int4"}, ("int4", "bf16")),
        (set(), {"path": "exact"}, ("fp32", "exact")),
        (set(), {"path": "torch"}, ("fp32", "torch")),
        ({"bf16"}, {"path": "torch"}, ("bf16", "torch")),
    ],
)
def test_packed_weights_take_the_fused_decoder(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], asked: dict[str, str], taken: tuple[str, str]
) -> None:
    monkeypatch.setattr(settings, "_cpu_flags", lambda: flags)
    assert settings.chosen(EngineSettings(**asked)) == taken  # type: ignore[arg-type]


def test_weights_that_do_not_stay_packed_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "why_not_fused", lambda spec, weights: "kept in fp16")
    for flags, dtype in ((set[str](), "fp32"), ({"avx512_bf16"}, "bf16")):
        monkeypatch.setattr(settings, "_cpu_flags", lambda flags=flags: flags)
        assert settings.chosen(EngineSettings()) == (dtype, "torch")
