"""Which text a step sees is a function of the seed and the step alone."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.errors import UserError
from stretto.train.data import REFERENCE, Bytes, Samples, check_sources, samples, texts


def made(count: int, length: int = 4, seed: int = 0) -> Samples:
    return Samples(tokens=np.arange(count * length + 1, dtype=np.int32), length=length, seed=seed)


def test_targets_are_the_tokens_that_come_next() -> None:
    tokens, targets = made(5).at([3, 0])
    assert tokens.tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert (targets == tokens + 1).all()


@given(count=st.integers(1, 40), batch=st.integers(1, 16), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_each_sequence_once_an_epoch(count: int, batch: int, epochs: int, seed: int) -> None:
    data = made(count, seed=seed)
    steps = -(-count * epochs // batch)
    seen = [number for step in range(steps) for number in data.batch(step, batch)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    data = made(50)
    first, second = data.batch(0, 50), data.batch(1, 50)
    assert first != second
    assert first != made(50, seed=1).batch(0, 50)
    assert first == made(50).batch(0, 50)


def test_the_last_sequences_are_kept_for_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    train, held_out = samples([str(tmp_path / "a.txt")], Bytes(), length=8, held_out=0.2, seed=0)
    assert (len(train), len(held_out)) == (7, 2)
    shared = Counter(train.tokens[: len(train) * 8].tolist()) + Counter(held_out.tokens.tolist())
    assert sum(shared.values()) == 80
    none, kept = samples([str(tmp_path / "a.txt")], Bytes(), length=8, held_out=0.0, seed=0)
    assert (len(none), len(kept)) == (9, 0)


def test_files_by_pattern_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert list(texts([f"{tmp_path}/*.txt", f"{tmp_path}/c.md"])) == ["a.txt", "b.txt", "c.md"]


def test_a_name_may_hold_what_is_a_pattern_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "notes[1].txt").write_text("a")
    assert list(texts([str(tmp_path / "notes[1].txt")])) == ["a"]
    with pytest.raises(UserError, match=r"data\.0: '~nobody-here/x\.txt' cannot be found: "):
        check_sources(["~nobody-here/x.txt"])


def test_the_reference_is_on_every_machine() -> None:
    (text,) = texts([REFERENCE])
    assert len(text) > 100_000
    assert "assert" in text


@pytest.mark.parametrize(
    ("content", "length", "said"),
    [
        (None, 8, "there is no file"),
        (b"\xff\xfe\x00", 8, "cannot be read"),
        (b"short", 8, "has 5 tokens, less than 2 sequences of 8"),
    ],
)
def test_mistakes_name_the_source(tmp_path: Path, content: bytes | None, length: int, said: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        samples([str(file)], Bytes(), length=length, held_out=0.1, seed=0)


def test_a_missing_file_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.1"):
        check_sources([REFERENCE, str(tmp_path / "none.txt")])
    check_sources([REFERENCE, "hub:some/name"])


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        column_names = ("text",)

        def __getitem__(self, name):  # type: ignore[no-untyped-def, override]
            return [row[name] for row in self]

    asked = []

    def load_dataset(name: str, split: str) -> Rows:
        asked.append((name, split))
        if name == "missing":
            raise RuntimeError("no such data set")
        rows = Rows([{"text": "one"}, {"text": "two"}])
        if name == "pictures":
            rows.column_names = ("image",)
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(texts(["hub:some/set:test", "hub:other"])) == ["one", "two"] * 2
    assert asked == [("some/set", "test"), ("other", "train")]
    with pytest.raises(UserError, match="has the columns image"):
        list(texts(["hub:pictures"]))
    with pytest.raises(UserError, match="no such data set"):
        list(texts(["hub:missing"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(texts(["hub:some/set"]))
