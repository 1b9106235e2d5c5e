"""Frozen language models from disk, tensor by tensor, to where each tensor is to stay.

transformers maps a file into memory and copies where the precision differs, so that for a while a
process holds the weights twice. Here the model is built without weights, and every tensor is read
from its file straight into the streamed blocks (`load_streamed`), or handed to DeepSpeed,
which spreads it before the next one is read (`load_partitioned`).

A checkpoint whose names are not the model's (one that transformers would rename, or not of
safetensors) is loaded by transformers instead, and then moved.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from blip2fast.checkpointing import load_language_model
from blip2fast.offload.blocks import find_blocks
from blip2fast.offload.quantised import Storage
from blip2fast.offload.streaming import BlockStream, stream_blocks

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
_OWN_PAGES = 1 << 20  # bytes from which a tensor gets pages of its own
_PIECE = 4 << 20  # bytes read at a time where the precision differs


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor lies on disk: from byte `start` of a file."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in `dtype` if it is a floating-point one; a copy of its own in memory.

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


def _own_pages(shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """An empty tensor; a large one goes back to the system as soon as it is dropped.

    malloc would keep it: between weights that stay, a third of a model has been seen lying idle.
    """
    dtype = dtype or torch.float32
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _OWN_PAGES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)


def tensor_files(name: str) -> dict[str, TensorFile]:
    """Every tensor of a checkpoint, by its name; empty where it is not of safetensors.

    Args:
        name: folder or hub name.

    Raises:
        ValueError: a damaged file.
    """
    index = _file(name, "model.safetensors.index.json")
    if index is not None:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    found: dict[str, TensorFile] = {}
    for shard in shards:
        path = _file(name, shard)
        if path is None:
            return {}
        found |= _header(path)
    return found


def _file(name: str, file: str) -> Path | None:
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


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters of PyTorch's layers get no memory; buffers are computed as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def empty_language_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A language model without weights: large parameters are on the meta device.

    Args:
        name: folder or hub name.

    Raises:
        ValueError: not there.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"language model {name!r}: not there: give a local folder or a hub name that can be "
            f"reached ({str(error).splitlines()[0]})"
        ) from error
    return build_empty(config, dtype)


def build_empty(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """As `empty_language_model`, from a configuration of transformers."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # draws nothing: the trained part starts as if transformers had loaded the model
    with torch.random.fork_rng([]), _EmptyOnMeta():
        model = kind.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    return model.eval()


def load_streamed(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    buffers: int = 2,
    storage: Storage = "as_is",
    recompute: bool = True,
) -> tuple[PreTrainedModel, BlockStream]:
    """A frozen language model whose blocks are streamed from the start.

    Args:
        name: folder or hub name.
        dtype: of its weights.
        device, buffers, storage, recompute: as in `stream_blocks`.

    Returns:
        The model and its stream.

    Raises:
        ValueError: not there, damaged, or what `stream_blocks` refuses.
    """
    model = empty_language_model(name, dtype)
    sources = _sources(model, name, dtype)
    if sources is None:
        model = load_language_model(name, dtype)
        model.requires_grad_(False)
        return model, stream_blocks(model, device, buffers, storage, recompute=recompute)
    stream = stream_blocks(model, device, buffers, storage, recompute=recompute)
    paths = {id(module): path for path, module in model.named_modules()}
    for index, block in enumerate(stream.blocks):
        for weight in stream.names(index):
            full = f"{paths[id(block)]}.{weight}"
            stream.write(index, weight, sources[full].read(dtype))
    _fill(model, sources, dtype)
    model.to(stream.device)
    _finish(model, name, sources)
    return model, stream


def load_partitioned(
    name: str, dtype: torch.dtype, deepspeed_values: dict[str, Any]
) -> PreTrainedModel:
    """A frozen language model whose blocks DeepSpeed ZeRO-3 spreads as they are read.

    Every process calls this. The rest of the model is spread when the engine starts.

    Args:
        name: folder or hub name.
        dtype: of its weights.
        deepspeed_values: DeepSpeed's configuration, with ZeRO stage 3.

    Returns:
        The model.

    Raises:
        ValueError: not there, or damaged.
    """
    import deepspeed

    model = empty_language_model(name, dtype)
    sources = _sources(model, name, dtype)
    if sources is None:
        return load_language_model(name, dtype)
    paths = {id(module): path for path, module in model.named_modules()}
    first: list[Any] = []

    def spread(parameter: nn.Parameter) -> None:
        if first:
            # it knows how: one swapper serves all where they go to nvme
            first[0].convert_to_zero_parameters(param_list=[parameter])
            return
        holder = nn.ParameterList([parameter])
        deepspeed.zero.Init(module=holder, config_dict_or_path=deepspeed_values, dtype=dtype)
        first.append(parameter)

    for block in find_blocks(model):
        _fill(block, sources, dtype, f"{paths[id(block)]}.", spread)
    _fill(model, sources, dtype)
    _finish(model, name, sources)
    return model


Sources = dict[str, TensorFile]


def _sources(model: PreTrainedModel, name: str, dtype: torch.dtype) -> Sources | None:
    """Where every tensor of the model is; None where transformers has to load it."""
    kept = model._keep_in_fp32_modules_strict or (
        dtype == torch.float16 and model._keep_in_fp32_modules
    )
    if kept and dtype != torch.float32:
        return None
    files = tensor_files(name)
    base = f"{model.base_model_prefix}."
    sources: Sources = {}
    groups: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for full, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(full)
        shapes[full] = tuple(tensor.shape)
    for tied in groups.values():
        present = {full: entry for full in tied if (entry := _entry(files, full, base))}
        if not present:
            return None
        first, *others = dict.fromkeys(present.values())
        # a model that ties them by default may come with two tensors after all (FlanT5's head)
        equal = {first: first} | {o: first if _equal(o, first) else o for o in others}
        sources |= {full: equal[present.get(full, first)] for full in tied}
    for full, source in sources.items():
        if source.shape != shapes[full]:
            raise ValueError(
                f"{source.path}: {full} has the shape {source.shape}, the model's is "
                f"{shapes[full]}; do config.json and the weights belong together?"
            )
    buffers = dict(model.named_buffers())
    if any(b.device.type == "meta" and full not in sources for full, b in buffers.items()):
        return None
    return sources


def _entry(files: Sources, full: str, base: str) -> TensorFile | None:
    """A tensor's place, its name with or without the prefix of the model's inner part."""
    names = (full, base + full, full.removeprefix(base))
    return next((files[name] for name in names if name in files), None)


def _equal(one: TensorFile, other: TensorFile) -> bool:
    same_type = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_type and torch.equal(one.read(), other.read())


def _fill(
    module: nn.Module,
    sources: Sources,
    dtype: torch.dtype,
    prefix: str = "",
    then: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Give every parameter and saved buffer its values; those that ZeRO-3 has are left.

    Args:
        module, prefix: what is filled, and the start of its names.
        sources, dtype: where from, and in which precision.
        then: called with each parameter before the next one is read.
    """
    filled: dict[TensorFile, nn.Parameter] = {}
    for path, inner in module.named_modules():
        start = f"{prefix}{path}." if path else prefix
        for name, parameter in list(inner.named_parameters(recurse=False)):
            if hasattr(parameter, "ds_id"):
                continue  # ZeRO-3 has spread it
            source = sources[start + name]
            if source not in filled:
                filled[source] = nn.Parameter(source.read(dtype), requires_grad=False)
                if then is not None:
                    then(filled[source])
            inner._parameters[name] = filled[source]
        for name in [name for name, _ in inner.named_buffers(recurse=False)]:
            if start + name in sources:
                inner._buffers[name] = sources[start + name].read(dtype)


def _finish(model: PreTrainedModel, name: str, sources: Sources) -> None:
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if sources[target] != sources[source]:
            del ties[target]  # else saving would drop it
    model.name_or_path = model.config.name_or_path = name
    if model.can_generate() and _file(name, "generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(name)
