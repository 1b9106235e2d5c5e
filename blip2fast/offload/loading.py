"""Loads frozen language models tensor by tensor, each directly to its final location.

transformers memory-maps a checkpoint and copies tensors whose dtype differs, so that a process
temporarily holds the weights twice. Here the model is built without weights, and every tensor is
read from its file directly into the streamed blocks (`load_streamed`), or passed to DeepSpeed,
which partitions it before the next one is read (`load_partitioned`).

A checkpoint whose tensor names do not match the model's (transformers would rename them), or that
is not in safetensors format, is loaded by transformers and then moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
)

from blip2fast._choices import Storage
from blip2fast._imports import needs
from blip2fast.frozen.identity import FrozenIdentity, identify, note_identity
from blip2fast.frozen.language_models import load_language_model, quantised_fault
from blip2fast.frozen.local_models import not_found
from blip2fast.offload.blocks import find_blocks
from blip2fast.offload.streaming import BlockStream, stream_blocks
from blip2fast.offload.tensor_files import Sources, TensorFile, file_of, tensor_files


class _EmptyOnMeta(TorchFunctionMode):
    """Allocate parameters on the meta device; compute buffers as usual."""

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
        ValueError: not found.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("language model", name, error)) from error
    return build_empty(config, dtype)


def build_empty(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Like `empty_language_model`, from a transformers configuration."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # restore the RNG state, so that the trained part is initialised as if transformers had loaded
    # the model
    with torch.random.fork_rng([]), _EmptyOnMeta():
        model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    model.requires_grad_(False)
    return model.eval()


def source_identity(name: str) -> FrozenIdentity | None:
    """The identity of the model at `name`, from samples of its files, without loading it.

    None if transformers would rename or convert its tensors, or if they are quantised or not in
    safetensors format: then load the model and call `identify_model`.

    Raises:
        ValueError: not found, or the files do not belong to its configuration.
    """
    model = empty_language_model(name, torch.float32)
    if getattr(model.config, "quantization_config", None) is not None:
        return None
    sources = _sources(model, name, torch.float32)
    return None if sources is None else _identity(model, name, sources)


def _identity(model: PreTrainedModel, name: str, sources: Sources) -> FrozenIdentity:
    return identify(name, model.config, (sources[full].sample() for full in model.state_dict()))


def load_streamed(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    buffers: int = 2,
    storage: Storage = "as_is",
    recompute: bool = True,
) -> tuple[PreTrainedModel, BlockStream]:
    """Load a frozen language model with streamed blocks.

    Args:
        name: folder or hub name.
        dtype: dtype of its weights.
        device, buffers, storage, recompute: as in `stream_blocks`.

    Returns:
        The model and its stream.

    Raises:
        ValueError: not found, damaged, quantised by a library, or refused by `stream_blocks`.
    """
    model = empty_language_model(name, dtype)
    _refuse_quantised(model, name)
    sources = _sources(model, name, dtype)
    if sources is None:
        model = load_language_model(name, dtype)
        model.requires_grad_(False)
        note_identity(model)
        return model, stream_blocks(model, device, buffers, storage, recompute=recompute)
    note_identity(model, _identity(model, name, sources))
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
    """Load a frozen language model whose blocks ZeRO-3 partitions as they are read.

    Every process must call this. The rest of the model is partitioned when the engine starts.

    Args:
        name: folder or hub name.
        dtype: dtype of its weights.
        deepspeed_values: DeepSpeed's configuration, with ZeRO stage 3.

    Returns:
        The model.

    Raises:
        ValueError: not found, damaged, or quantised by a library.
    """
    with needs("train", "deepspeed"):
        import deepspeed

    model = empty_language_model(name, dtype)
    _refuse_quantised(model, name)
    sources = _sources(model, name, dtype)
    if sources is None:
        model = load_language_model(name, dtype)
        note_identity(model)
        return model
    note_identity(model, _identity(model, name, sources))
    paths = {id(module): path for path, module in model.named_modules()}
    first: list[Any] = []

    def spread(parameter: nn.Parameter) -> None:
        if first:
            # reuse the first parameter's converter, so that NVMe offload has a single swapper
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


def _refuse_quantised(model: PreTrainedModel, name: str) -> None:
    fault = quantised_fault("language model", name, model.config)
    if fault is not None:
        raise ValueError(fault)


def _sources(model: PreTrainedModel, name: str, dtype: torch.dtype) -> Sources | None:
    """The file location of every tensor; None if only transformers can load the model."""
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
        # a checkpoint may store two different tensors for tied weights (FlanT5's head)
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
    """Look up a tensor, with or without the base model's prefix."""
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
    """Load every parameter and saved buffer, except those that ZeRO-3 has partitioned.

    Args:
        module, prefix: the module to fill, and the prefix of its tensor names.
        sources, dtype: file locations of the tensors, and the dtype to load them in.
        then: called with each parameter before the next one is read.
    """
    filled: dict[TensorFile, nn.Parameter] = {}
    for path, inner in module.named_modules():
        start = f"{prefix}{path}." if path else prefix
        for name, parameter in list(inner.named_parameters(recurse=False)):
            if hasattr(parameter, "ds_id"):
                continue  # already partitioned by ZeRO-3
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
            del ties[target]  # otherwise saving would drop it
    model.name_or_path = model.config.name_or_path = name
    if model.can_generate() and file_of(name, "generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(name)
