"""Text of a growing sequence of tokens, piece by piece. Knows nothing of stop strings or requests."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jaxserve.text.tokenizer import Tokenizer

_EACH_BYTE = "jaxserve.each_byte"
# A character has at most 4 bytes, so these many say whether the prompt ends inside one.
_TAIL_BYTES = 4


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each byte that is no text, as byte-fallback decoders have it; "replace" would join some."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _each_byte)


class Detokenizer:
    """Streams the text that `tokens` add after `prompt`: constant work for a token, whole characters only.

    All that was returned, plus `flush()`, is `Tokenizer.decode(prompt + tokens)` without the prompt's part. One
    exception: byte-fallback tokenizers decode a run of byte tokens as all or nothing, so that one bad byte unmakes
    characters before it; here characters stand once they are complete, and only the bad bytes become U+FFFD.
    """

    __slots__ = ("_bytes", "_errors", "_rest", "_started", "_strip", "_first_drops_spaces")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True):
        decoding = tokenizer.decoding
        self._bytes = tokenizer.bytes_of(skip_special_tokens)
        self._errors = _EACH_BYTE if decoding.byte_fallback else "replace"
        self._rest = b""
        self._strip = decoding.strip
        self._first_drops_spaces = decoding.first_drops_spaces
        self._started = not (self._strip or self._first_drops_spaces)
        self._follow(prompt)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that became certain with `tokens`."""
        if not self._started:
            return self._begin(tokens)
        table = self._bytes
        return self._decode(b"".join([table[token] for token in tokens]))

    def flush(self) -> str:
        """What an unfinished character at the end comes to. Nothing may be pushed afterwards."""
        rest, self._rest = self._rest, b""
        return codecs.utf_8_decode(rest, self._errors, True)[0]

    def _decode(self, more: bytes) -> str:
        """The text that `more` completes; bytes of an unfinished character wait."""
        data = self._rest + more
        text, used = codecs.utf_8_decode(data, self._errors, False)
        self._rest = data[used:]
        return text

    def _follow(self, prompt: Sequence[int]) -> None:
        """Takes the place after `prompt`, whose last token may end inside a character."""
        tail = b""
        for token in reversed(prompt):
            tail = self._bytes[token] + tail
            if len(tail) >= _TAIL_BYTES:
                break
        if tail:
            self._started = True
            self._decode(tail)

    def _begin(self, tokens: Sequence[int]) -> str:
        """As `push`, where the text starts: its first spaces may not be part of it."""
        for index, token in enumerate(tokens):
            piece = self._bytes[token]
            if not piece:
                continue
            if self._first_drops_spaces:
                self._first_drops_spaces = False
                piece = piece.replace(b" ", b"")
            text = self._decode(piece)
            while self._strip and text.startswith(" "):
                text = text[1:]
                self._strip -= 1
            if text or not self._strip:
                self._started = True
                return text + self.push(tokens[index + 1 :])
        return ""
