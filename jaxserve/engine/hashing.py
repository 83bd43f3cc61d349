"""Identity of cached KV: a chain of page hashes over tokens and everything else that their KV depends on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def chain_root(identity: str, salt: str) -> bytes:
    """Start of a chain. `identity` names model, weight epoch, layer schedule, KV format and its parameters; `salt` is
    the tenant's: equal prompts of different salts never share pages."""
    root = blake2b(identity.encode(), digest_size=DIGEST_BYTES, key=blake2b(salt.encode(), digest_size=32).digest())
    return root.digest()


def extend_chain(last: bytes, tokens: Sequence[int], first_page: int, pages: int, page_tokens: int) -> list[bytes]:
    """Hashes of `pages` full pages of `tokens` from `first_page` on; `last` is the hash before them."""
    hashes = []
    for page in range(first_page, first_page + pages):
        body = array("i", tokens[page * page_tokens : (page + 1) * page_tokens]).tobytes()
        last = blake2b(last + body, digest_size=DIGEST_BYTES).digest()
        hashes.append(last)
    return hashes
