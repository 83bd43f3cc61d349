"""The wire form of a KV page: what travels to a disk, a host or another engine. Knows no socket and no device.

A page is one record: magic, length of the header, header (msgpack), then the bytes of its arrays in C order, one after
the other. Importing it again gives the same bits.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import msgspec
import numpy as np

from jaxserve.kv.format import KVFormat
from jaxserve.types import KVGroup

MAGIC = b"JSKV\x01"


class PageHeader(msgspec.Struct, frozen=True):
    """`format` names the KV format, `cls` the page class, `identity` is the chain hash of what the page holds (tokens,
    model, adapter, format parameters, ...), `digest` the BLAKE2b hash of the array bytes."""

    format: str
    cls: int
    identity: bytes
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    digest: bytes


class BadPageError(ValueError):
    """A record that is not a page, is damaged, or holds a page of another format or shape."""


def export_page(format: KVFormat, cls: int, page: Any, identity: bytes) -> bytes:
    """The record of one page of class `cls`; `page`: its host arrays, as `gather_pages` stages them, n = 1."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(page)]
    body = b"".join(leaf.tobytes() for leaf in leaves)
    arrays = tuple((leaf.dtype.name, leaf.shape) for leaf in leaves)
    header = msgspec.msgpack.encode(PageHeader(format.name, cls, identity, arrays, _digest(body)))
    return MAGIC + len(header).to_bytes(4, "little") + header + body


def import_page(format: KVFormat, group: KVGroup, record: bytes) -> tuple[PageHeader, Any]:
    """The header and the host arrays of a record, for `scatter_pages` with n = 1.

    Raises BadPageError unless the record is whole and holds finite values in exactly the shapes that `format` gives a
    page of `group`: what is imported is read by every later step.
    """
    start = len(MAGIC) + 4
    if record[: len(MAGIC)] != MAGIC:
        raise BadPageError("not a KV page: it does not begin with the magic bytes of this version.")
    end = start + int.from_bytes(record[len(MAGIC) : start], "little")
    try:
        header = msgspec.msgpack.decode(record[start:end], type=PageHeader)
    except msgspec.MsgspecError as error:
        raise BadPageError(f"the header of the KV page cannot be read: {error}") from error
    if header.format != format.name:
        raise BadPageError(f"the KV page is in format {header.format!r}, this pool is in {format.name!r}.")
    kinds = format.kinds(group)
    if not 0 <= header.cls < len(kinds):
        raise BadPageError(f"the KV page is of class {header.cls}, but format {format.name!r} has {len(kinds)}.")
    shapes = format.part(format.payload(group, (1,) * len(kinds)), header.cls)
    leaves, tree = jax.tree.flatten(shapes)
    wanted = tuple((leaf.dtype.name, leaf.shape) for leaf in leaves)
    if header.arrays != wanted:
        raise BadPageError(f"the KV page has arrays {header.arrays}, this pool needs {wanted}.")
    body = memoryview(record)[end:]
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves]
    if len(body) != sum(sizes) or _digest(body) != header.digest:
        raise BadPageError("the KV page is damaged: its bytes do not match its hash.")
    arrays = []
    for leaf, size in zip(leaves, sizes, strict=True):
        array = np.frombuffer(body[:size], leaf.dtype).reshape(leaf.shape)
        arrays.append(array)
        body = body[size:]
    page = jax.tree.unflatten(tree, arrays)
    if not format.finite(page):
        raise BadPageError("the KV page holds values that are not finite.")
    return header, page


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()
