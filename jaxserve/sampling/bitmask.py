"""Token bitmasks on the host: bit i % 32 of word i // 32 says whether token i is allowed. Numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxserve.sampling.state import WORD_BITS, mask_words


def all_allowed(vocab: int) -> np.ndarray:
    """uint32 [ceil(vocab / 32)] with every bit set, those past the vocabulary too."""
    return np.full(mask_words(vocab), 0xFFFFFFFF, np.uint32)


def of_tokens(vocab: int, ids: Iterable[int]) -> np.ndarray:
    """uint32 [ceil(vocab / 32)] with the bits of `ids` set. Raises ValueError for an id outside the vocabulary."""
    ids = np.asarray(list(ids), np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        bad = int(ids[(ids < 0) | (ids >= vocab)][0])
        raise ValueError(f"Token {bad} is outside the vocabulary of {vocab} tokens.")
    bits = np.zeros(mask_words(vocab) * WORD_BITS, bool)
    bits[ids] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def allowed_mask(vocab: int, allowed: Sequence[int] | None, banned: Sequence[int] = ()) -> np.ndarray:
    """Mask of `allowed` (None: every token) without `banned`."""
    mask = all_allowed(vocab) if allowed is None else of_tokens(vocab, allowed)
    return mask & ~of_tokens(vocab, banned)
