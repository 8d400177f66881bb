"""Text to token ids and back, from a `tokenizer.json` or from the vocabulary in a GGUF file.

GGUF stores byte-level BPE as tokens, merges and the name of the rule that splits text first; the rules here
are those of the models read (llama.cpp's names). SentencePiece vocabularies are refused: their normaliser
is not in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from stretto.core.errors import UserError
from stretto.models.weights import read_json

_CONTROL, _USER_DEFINED = 3, 4
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: Mapping[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""The regular expression of each rule; None for GPT-2's own, which the byte-level step has built in."""


class Tokenizer:
    """Immutable; `stream()` makes the state that incremental decoding needs.

    Attributes:
        bos_id: the token that starts a sequence, if there is one.
        eos_id: the token the file names as the end of text, if it does.
        eos_ids: tokens at which a reply ends: the file's end of text and the end of a chat turn.
        chat_template: jinja2 source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        file: str,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        prefix: tuple[int, ...] = (),
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self._file = file
        self._prefix = prefix
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eos_ids = eos_ids
        self.chat_template = chat_template

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, file: str = "GGUF") -> Tokenizer:
        """The tokenizer in GGUF metadata; `UserError` when it is of a kind that is not read."""
        backend = _gguf_backend(metadata, file)
        bos, eos, turn = (_stated(metadata, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot"))
        template = metadata.get("tokenizer.chat_template")
        return cls(
            backend,
            file=file,
            bos_id=bos,
            eos_id=eos,
            eos_ids=frozenset({end for end in (eos, turn) if end is not None} | _turn_ends(backend)),
            prefix=(bos,) if bos is not None and metadata.get("tokenizer.ggml.add_bos_token") else (),
            chat_template=template if isinstance(template, str) else None,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a folder in Hugging Face's layout."""
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                "is missing", file=str(path), right="save the model's tokenizer.json beside its weights"
            ) from None
        except Exception as error:  # noqa: BLE001 (tokenizers raises bare Exception for any malformed file)
            raise UserError(f"is not a tokenizer: {error}", file=str(path), right="download it again") from None
        backend.no_padding()
        backend.no_truncation()
        config = _optional_json(folder / "tokenizer_config.json")
        generation = {
            **_optional_json(folder / "config.json"),
            **_optional_json(folder / "generation_config.json"),
        }
        bos = _token_id(backend, config.get("bos_token"))
        return cls(
            backend,
            file=str(folder),
            bos_id=bos,
            eos_id=_token_id(backend, config.get("eos_token")),
            eos_ids=_folder_ends(backend, config, generation),
            chat_template=_folder_template(folder, config),
        )

    def save(self, folder: Path) -> None:
        """Write it in Hugging Face's layout, for `from_folder` and others; `OSError` if that cannot be."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        names = {"bos_token": self._text_of(self.bos_id), "eos_token": self._text_of(self.eos_id)}
        if self._prefix:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{names['bos_token']} $A", special_tokens=[(names["bos_token"], self._prefix[0])]
            )
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        config: dict[str, Any] = {name: text for name, text in names.items() if text}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @property
    def size(self) -> int:
        """Ids that have a text; a model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            special: add what the model wants around a text (a start token); False for text that is already
            a prompt.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return [*self._prefix, *ids] if special else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, special ones by their name; none for ids without a text."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    @cached_property
    def _bytes(self) -> list[bytes]:
        spell = _speller(self._backend)
        added = self._backend.get_added_tokens_decoder()
        texts = (self._backend.id_to_token(token) for token in range(self.size))
        return [
            b"" if text is None else text.encode() if token in added else spell(text)
            for token, text in enumerate(texts)
        ]

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are marks and no text."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, how in added.items() if how.special)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, reply: bool = True, **variables: Any) -> str:
        """The prompt for a conversation; with `reply` it ends where the assistant's turn begins.

        Raises:
            UserError: the model has no chat template, or it refuses the messages.
        """
        from stretto.models.chat import render_chat

        if self.chat_template is None:
            raise UserError("has no chat template", file=self._file, right="send a prompt instead of messages")
        names = {
            "bos_token": self._text_of(self.bos_id),
            "eos_token": self._text_of(self.eos_id),
            "add_generation_prompt": reply,
            "tools": None,
        }
        return render_chat(self.chat_template, messages, file=self._file, variables={**names, **variables})

    def _text_of(self, token: int | None) -> str:
        return "" if token is None else self._backend.id_to_token(token) or ""

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Decode one token at a time."""
        return TextStream(self, skip_special=skip_special)


class TextStream:
    """Text of a growing reply: the pieces of `push` and `finish` together are what `decode` gives."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still missing bytes."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        # The last token alone stays, as context for decoders that treat the first token of a text otherwise.
        self._ids = self._ids[-1:]
        self._shown = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        if self._shown.endswith("\ufffd"):
            self._ids, self._shown = [], ""
        return new

    def finish(self) -> str:
        """What is left when the reply ends in the middle of a character."""
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)[len(self._shown) :]
        self._ids, self._shown = [], ""
        return text


def _speller(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """What a token's name in the vocabulary stands for, by the rule of the decoder."""
    rules = set(_types(json.loads(backend.to_str())["decoder"]))
    if "ByteLevel" in rules:
        return lambda name: b"".join(_BYTE_OF.get(c) or c.encode() for c in name)
    if rules & {"ByteFallback", "Metaspace"}:
        return _sentence_piece
    return lambda name: str(backend.decoder.decode([name]) if backend.decoder else name).encode()


def _types(decoder: object) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for part in decoder.get("decoders") or ():
            yield from _types(part)


def _sentence_piece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, bytes]:
    """The letter by which byte-level vocabularies write each byte: printable ones themselves, the others in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


_BYTE_OF = _byte_letters()


def _gguf_backend(metadata: Mapping[str, Any], file: str) -> tokenizers.Tokenizer:
    kind, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(rule, str) or rule not in _SPLITS:
        what, field = (kind, "model") if kind != "gpt2" else (rule, "pre")
        known = "gpt2" if kind != "gpt2" else ", ".join(_SPLITS)
        raise UserError(
            f"its tokenizer is of kind {what!r}",
            file=file,
            field=f"tokenizer.ggml.{field}",
            right=f"one of {known} is read",
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not _strings(tokens) or not _strings(merges):
        raise UserError(
            "has no vocabulary or no merges", file=file, field="tokenizer.ggml", right="use a complete file"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, [_pair(merge) for merge in merges])
    except Exception as error:  # noqa: BLE001 (tokenizers raises bare Exception for merges outside the vocabulary)
        raise UserError(f"has a broken vocabulary: {error}", file=file, right="download it again") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _splitter(str(rule))
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, tokens, metadata.get("tokenizer.ggml.token_type"))
    return backend


def _strings(values: object) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _splitter(rule: str) -> pre_tokenizers.PreTokenizer:
    pattern = _SPLITS[rule]
    if pattern is not None:
        first = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return plain


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], kinds: object) -> None:
    if not isinstance(kinds, list):
        return
    marked = list(zip(tokens, kinds, strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in marked if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in marked if k == _USER_DEFINED])


def _stated(metadata: Mapping[str, Any], key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and value >= 0 else None


def _turn_ends(backend: tokenizers.Tokenizer) -> set[int]:
    return {found for end in _ENDS if (found := backend.token_to_id(end)) is not None}


def _folder_ends(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> frozenset[int]:
    stated = generation.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    named = _token_id(backend, config.get("eos_token"))
    ends = {token for token in [*listed, named] if isinstance(token, int)}
    return frozenset(ends | _turn_ends(backend))


def _token_id(backend: tokenizers.Tokenizer, token: object) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"cannot be read: {problem}", file=str(beside), right="a UTF-8 text file") from None
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
