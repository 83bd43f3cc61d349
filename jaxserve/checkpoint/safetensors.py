"""The safetensors container: views of tensors in mapped files, and writing. Knows nothing of what the tensors mean."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """One mapped file. Views are read-only and stay valid as long as anything refers to them."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{path} is truncated: {size} bytes cannot hold a safetensors header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        length = struct.unpack("<Q", self._map[:8])[0]
        self._data = 8 + length
        if self._data > size:
            raise CheckpointError(f"{path} is truncated or no safetensors file: its header claims {length} bytes")
        try:
            header = json.loads(self._map[8 : self._data])
            header.pop("__metadata__", None)
            self._entries = {n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header: {error!r}") from error
        end = max((e[3] for e in self._entries.values()), default=0)
        if self._data + end > size:
            raise CheckpointError(f"{path} is truncated: it has {size} bytes, its tensors end at {self._data + end}")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def view(self, name: str) -> np.ndarray:
        """The tensor as an array over the mapping: nothing is read until elements are."""
        kind, shape, start, end = self._entries[name]
        if kind not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name!r} has dtype {kind}, which is not supported")
        dtype = DTYPES[kind]
        count = math.prod(shape)
        if end - start != count * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} {list(shape)} {kind} does not fit its {end - start} bytes"
            )
        return np.frombuffer(self._map, dtype, count, self._data + start).reshape(shape)

    def release(self, name: str) -> None:
        """Lets the system drop the tensor's pages from this process. Its views stay valid: they read the file again."""
        _, _, start, end = self._entries[name]
        first = -(-(self._data + start) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self._data + end - first
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


class TensorFolder:
    """All tensors of a folder: one file, or the shards that the index names."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        self._files: dict[str, SafetensorsFile] = {}
        if index.is_file():
            self._place = _read_index(index)
            for shard in sorted(set(self._place.values())):
                if not (folder / shard).is_file():
                    raise CheckpointError(f"{folder / shard} is missing, and {INDEX} lists it")
                self._files[shard] = SafetensorsFile(folder / shard)
            for name, shard in self._place.items():
                if name not in self._files[shard]:
                    raise CheckpointError(f"{folder / shard} has no tensor {name!r}, and {INDEX} says that it does")
        elif (folder / SINGLE).is_file():
            file = SafetensorsFile(folder / SINGLE)
            self._files[SINGLE] = file
            self._place = dict.fromkeys(file.names, SINGLE)
        else:
            raise CheckpointError(
                f"{folder} has neither {SINGLE} nor {INDEX}: save the model with safe_serialization=True"
            )

    @property
    def names(self) -> Iterable[str]:
        return self._place.keys()

    def file_of(self, name: str) -> Path:
        return self.folder / self._place[name]

    def view(self, name: str) -> np.ndarray:
        return self._files[self._place[name]].view(name)

    def release(self, name: str) -> None:
        self._files[self._place[name]].release(name)


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no safetensors index: {error!r}") from error


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `produce` makes its values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    produce: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: Path, entries: list[Entry], max_file_bytes: int) -> None:
    """Writes model.safetensors, or shards of at most `max_file_bytes` and their index. One tensor is held at a time."""
    shards: list[list[Entry]] = [[]]
    room = max_file_bytes
    for entry in entries:
        if shards[-1] and entry.nbytes > room:
            shards.append([])
            room = max_file_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, entries)
        (folder / INDEX).unlink(missing_ok=True)
        return
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard)
        place |= dict.fromkeys((entry.name for entry in shard), name)
    total = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / SINGLE).unlink(missing_ok=True)


def _write_file(path: Path, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = np.ascontiguousarray(entry.produce(), entry.dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
    partial.replace(path)
