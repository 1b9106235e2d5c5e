"""Locations of tensors in safetensors files, for reading or sampling them one at a time."""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import cached_file

from blip2fast.frozen.identity import Sample, sampled_parts

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_OWN_PAGES = 1 << 20  # minimum size in bytes for a tensor to get its own mapping
_PIECE = 4 << 20  # bytes read at a time if the dtype is converted


@dataclass(frozen=True)
class TensorFile:
    """The location of a tensor on disk."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor into new memory, converted to `dtype` if it is floating-point.

        Raises:
            ValueError: the file ends before the tensor does.
        """
        convert = dtype is not None and self.dtype.is_floating_point
        out = _own_pages(self.shape, dtype if convert else self.dtype)
        flat, done = out.view(-1), 0
        most = min(flat.numel(), max(1, _PIECE // self.dtype.itemsize))
        scratch = None if out.dtype == self.dtype else _own_pages((most,), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            while done < flat.numel():
                target = flat[done : done + most]
                piece = target if scratch is None else scratch[: len(target)]
                memory = memoryview(piece.view(torch.uint8).numpy().data)
                while memory:
                    got = file.readinto(memory)
                    if not got:
                        raise ValueError(f"{self.path}: ends inside a tensor; download it again")
                    memory = memory[got:]
                if piece is not target:
                    target.copy_(piece)
                done += len(target)
        return out

    def sample(self) -> Sample:
        """A sample of the tensor's values, for its identity; see `sampled_parts`."""
        parts, width = [], self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            for part in sampled_parts(math.prod(self.shape)):
                file.seek(self.start + part.start * width)
                parts.append(file.read((part.stop - part.start) * width))
        return self.shape, torch.frombuffer(bytearray(b"".join(parts)), dtype=self.dtype)


def _own_pages(shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """An empty tensor; a large one gets its own mapping and is returned to the OS when freed.

    malloc would keep freed memory between live weights: up to a third of a model's size has been
    seen unused.
    """
    dtype = dtype or torch.float32
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _OWN_PAGES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)


Sources = dict[str, TensorFile]


def tensor_files(name: str) -> dict[str, TensorFile]:
    """Every tensor of a checkpoint by name; empty if it is not in safetensors format.

    Args:
        name: folder or hub name.

    Raises:
        ValueError: a damaged file.
    """
    index = file_of(name, "model.safetensors.index.json")
    if index is not None:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    found: dict[str, TensorFile] = {}
    for shard in shards:
        path = file_of(name, shard)
        if path is None:
            return {}
        found |= _header(path)
    return found


def file_of(name: str, file: str) -> Path | None:
    """The path of a model's file, by folder or hub name; None if there is none."""
    if Path(name).expanduser().is_dir():
        path = Path(name).expanduser() / file
        return path if path.is_file() else None
    try:
        found = cached_file(name, file)
    except OSError:
        return None
    return None if found is None else Path(found)


def _header(path: Path) -> dict[str, TensorFile]:
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        except (struct.error, ValueError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from error
    found, length = {}, path.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}, which is not supported")
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        if end > length or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} does not fit the file; download it again")
        found[name] = TensorFile(path, start, dtype, shape)
    return found
