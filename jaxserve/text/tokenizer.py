"""A model's tokenizer: text to token ids and back, over the `tokenizers` library. Knows no templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxserve.config import ConfigError
from jaxserve.text.pieces import Decoding, read_decoding
from jaxserve.types import ParamError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class Tokenizer:
    """Token ids are the model's. Text that looks like a special token (`<|im_end|>`) is parsed as one wherever it
    stands, in prompts and in chat messages, as in vLLM and Hugging Face; who minds must escape it beforehand.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]):
        """`config`: the content of tokenizer_config.json. What `encode` adds (BOS, EOS) is the post-processor's part of
        tokenizer.json alone, as in transformers 5: `add_bos_token` and `add_eos_token` are for slow tokenizers."""
        backend.no_truncation()
        backend.no_padding()
        _add_tokens(backend, config)
        self.special_tokens: dict[str, str] = {name: text for name in _NAMED if (text := _content(config.get(name)))}
        """Names such as bos_token and what they are, for chat templates."""
        self._backend = backend
        self.decoding: Decoding = _decoding(backend)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")
        self._bytes = _Bytes(self, hidden=frozenset())
        self._visible_bytes = _Bytes(self, hidden=self.special_ids)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a folder in Hugging Face layout.

        Raises:
            ConfigError: no tokenizer.json, or a file that cannot be understood.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json; name a folder with one by --tokenizer, or write it "
                f"with AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None
        return cls(backend, read_tokenizer_config(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts the tokenizer's BOS (or what it defines) around them.

        Raises:
            ParamError: text that is not valid Unicode.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, on all cores."""
        for text in texts:
            if not isinstance(text, str):
                raise ParamError("prompt", f"a prompt must be text, not {type(text).__name__}")
        try:
            # Also for one text: `encode` would hold the interpreter lock meanwhile.
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise ParamError("prompt", "the prompt is not valid Unicode: it holds half of a surrogate pair") from None
        return [encoding.ids for encoding in found]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `tokens`. Ids that the tokenizer does not know have none.

        Raises:
            ParamError: something that is no id at all.
        """
        try:
            return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError):
            raise ParamError("tokens", "tokens must be token ids: whole numbers from 0 on") from None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text; they may be part of a character. Empty for an unknown id."""
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """A token as text for log-probs: special tokens as they are written, half characters as U+FFFD."""
        return self._bytes[token].decode(errors="replace")

    def bytes_of(self, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """`token_bytes` as a table that fills itself; special tokens are empty where they are to be skipped."""
        return self._visible_bytes if skip_special_tokens else self._bytes

    def token(self, token: int) -> str | None:
        """How the vocabulary spells a token; None for an unknown id."""
        return self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self._backend.token_to_id(token)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


class _Bytes(dict[int, bytes]):
    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]):
        super().__init__()
        self._tokenizer = tokenizer
        self._hidden = hidden

    def __missing__(self, token: int) -> bytes:
        text = None if token in self._hidden else self._tokenizer.token(token)
        found = self[token] = b"" if text is None else self._tokenizer.decoding.bytes_of(text)
        return found


def read_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json; empty where it has none.

    Raises:
        ConfigError: a file that is not a JSON object.
    """
    path = Path(folder) / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json declares, and special ones that tokenizer.json has as ordinary tokens."""
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is None:
            flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
            token = AddedToken(entry["content"], special=bool(entry.get("special")), **flags)
            add = backend.add_special_tokens if entry.get("special") else backend.add_tokens
            add([token])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for name in _NAMED:
        text = _content(config.get(name))
        if text and text not in known and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _decoding(backend: tokenizers.Tokenizer) -> Decoding:
    # The decoder's state is its part of tokenizer.json; the whole file as text would take a second for a large one.
    return read_decoding(json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None)
