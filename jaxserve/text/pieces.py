"""What bytes a token stands for. Reads the decoder part of a tokenizer.json; knows nothing of streams or requests.

Every decoder of the model families served here amounts to: each token becomes bytes on its own, the bytes are joined
and read as UTF-8, and something may be taken from the front of the text. Knowing the bytes makes streamed decoding
exact and cheap, and gives the bytes that OpenAI's log-probs report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.config import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Decoding:
    """How a tokenizer's tokens become text.

    `byte_level`: a token spells bytes in GPT-2's alphabet. `byte_fallback`: tokens such as <0xE2> are single bytes.
    `replaces`: substitutions inside a token. `prefix` stands before each token. `strip`: spaces to take from the front
    of the text at most. `first_drops_spaces`: the first token loses its spaces.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replaces: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    strip: int = 0
    first_drops_spaces: bool = False

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a token wherever it stands in a text."""
        if self.byte_level:
            try:
                return bytes(_GPT2_BYTES[character] for character in token)
            except KeyError:  # an added token, written as it reads
                return token.encode()
        for old, new in self.replaces:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        return (self.prefix + token).encode()


def read_decoding(spec: Mapping[str, Any] | None) -> Decoding:
    """The meaning of `decoder` in a tokenizer.json.

    Raises:
        ConfigError: a decoder that does not work token by token.
    """
    if spec is None:
        return Decoding(prefix=" ", strip=1)
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    found: dict[str, Any] = {"replaces": ()}
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            found["byte_level"] = True
        elif kind == "ByteFallback":
            found["byte_fallback"] = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Replace" and "String" in step["pattern"] and not fused:
            found["replaces"] += ((step["pattern"]["String"], step["content"]),)
        elif kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0:
            found["strip"] = step["start"]
        elif kind == "Metaspace":
            found["replaces"] += ((step["replacement"], " "),)
            found["first_drops_spaces"] = step["prepend_scheme"] != "never"
        else:
            raise ConfigError(
                f"the tokenizer's decoder step {kind} is not supported (ByteLevel, Metaspace, and "
                f"Replace, ByteFallback, Fuse, Strip in this order are)"
            )
    return Decoding(**found)


def _gpt2_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are themselves, the other bytes follow from U+0100 on."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


_GPT2_BYTES = _gpt2_bytes()
