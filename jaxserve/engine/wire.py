"""Messages as frames on a stream socket: four bytes of length, then msgpack. Knows types.py and nothing else."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

from jaxserve.types import FromCore, ToCore

LENGTH = struct.Struct("<I")
MAX_FRAME = 1 << 30

_encoder = msgspec.msgpack.Encoder()
_to_core = msgspec.msgpack.Decoder(ToCore)
_from_core = msgspec.msgpack.Decoder(FromCore)


def frame(message: ToCore | FromCore) -> bytes:
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def read_to_core(sock: socket.socket) -> ToCore | None:
    """The next message for a core; None at the end of the stream. Blocks.

    Raises:
        ValueError: a frame that is no message of ours.
    """
    head = read_exactly(sock, LENGTH.size)
    if head is None:
        return None
    body = read_exactly(sock, _checked(head))
    return None if body is None else _to_core.decode(body)


async def read_from_core(reader: asyncio.StreamReader) -> FromCore | None:
    """The next message of a core; None at the end of the stream.

    Raises:
        ValueError: a frame that is no message of ours.
    """
    try:
        head = await reader.readexactly(LENGTH.size)
        body = await reader.readexactly(_checked(head))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return _from_core.decode(body)


def _checked(head: bytes) -> int:
    (size,) = LENGTH.unpack(head)
    if size > MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes is larger than any message ({MAX_FRAME})")
    return size


def read_exactly(sock: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = sock.recv(min(size - len(parts), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
