"""The op calls of both stages and of inference, for checking their kernels in advance."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blip2fast.kernels.cuda_needs import capability_of
from blip2fast.ops.bias_gelu import BACKENDS as GELU_BACKENDS
from blip2fast.ops.calls import AttentionCall, BiasGeluCall, DropoutAddLayerNormCall, ITCCall
from blip2fast.ops.dispatch import Backend, kernels_set_to, rival_of
from blip2fast.ops.dropout_add_layer_norm import BACKENDS as NORM_BACKENDS
from blip2fast.ops.itc.sweep import BACKENDS as ITC_BACKENDS
from blip2fast.ops.kernel_checks import Request, checks
from blip2fast.ops.qformer_attention.backends import BACKENDS as ATTENTION_BACKENDS
from blip2fast.ops.records import Record, code_hash


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Q-Former and its data; by default BLIP-2's.

    Attributes:
        hidden: C, width of the Q-Former.
        heads: H.
        queries: Q.
        text: Tokens of the longest text; 0: no text.
        images: S, tokens of an image.
        features: Width of the contrastive features; 0: no contrastive loss.
        dropout: Whether training uses dropout.
    """

    hidden: int = 768
    heads: int = 12
    queries: int = 32
    text: int = 32
    images: int = 257
    features: int = 256
    dropout: bool = True


BLIP2 = Sizes()
UNCHECKED = "not checked yet: it is at first use, or by `blip2fast kernels check`"
OpCall = tuple[str, Sequence[Backend[Any]], Any]


def usual_calls(device: torch.device, dtype: torch.dtype, sizes: Sizes = BLIP2) -> list[OpCall]:
    """The op calls that both stages and inference make, one of each kind.

    Args:
        device: Device of the calls.
        dtype: Compute precision; training keeps its parameters in fp32.
        sizes: Of the model.

    Returns:
        `(op name, backends, call)` tuples.
    """
    where: dict[str, Any] = {"device": device.type, "gpu": device.index}
    capability = capability_of(device)
    wide, drops = torch.float32, (False, True) if sizes.dropout else (False,)
    calls: list[OpCall] = []
    # slowest to compile first
    if sizes.features:
        # normalised features are multiplied in fp16 (`stage1_contrast`)
        products = wide if dtype == wide else torch.float16
        for ids in (False, True):
            pairs = (256, 256, sizes.queries, sizes.features)
            call = ITCCall(*pairs, products, device.type, 0.0, ids, device.index, capability)
            calls.append(("itc_loss", ITC_BACKENDS, call))
    for attention_call in _attention_calls(
        {**where, "capability": capability}, dtype, sizes, drops
    ):
        op = "qformer_cross_attention" if attention_call.cross else "qformer_attention"
        calls.append((op, ATTENTION_BACKENDS, attention_call))
    # parameters are fp32 under autocast; in train.py and in inference everything is in `dtype`
    for parameters in dict.fromkeys((wide, dtype)):
        gelu_call = BiasGeluCall(dtype, bias=parameters, **where)
        calls.append(("bias_gelu", GELU_BACKENDS, gelu_call))
        # with and without a copy for the next matmul
        copies = (dtype,) if parameters == dtype else (dtype, wide)
        for copy, drop in [(copy, drop) for copy in copies for drop in drops]:
            norm_call = DropoutAddLayerNormCall(
                width=sizes.hidden,
                dtypes=(dtype, parameters, parameters, copy),
                dropout=drop,
                parameters=parameters,
                **where,
            )
            calls.append(("dropout_add_layer_norm", NORM_BACKENDS, norm_call))
    return calls


def _attention_calls(
    where: dict[str, Any], dtype: torch.dtype, sizes: Sizes, drops: Sequence[bool]
) -> Iterator[AttentionCall]:
    same = {
        "queries": sizes.queries,
        "heads": sizes.heads,
        "width": sizes.hidden // sizes.heads,
        "dtype": dtype,
        "key_mask": False,
        "lse": False,
        **where,
    }
    for drop in drops:
        for text in dict.fromkeys((0, sizes.text)):
            yield AttentionCall(keys=text, dropout=drop, cross=False, **same)
        for index in (False, True):
            yield AttentionCall(keys=sizes.images, dropout=drop, cross=True, indexed=index, **same)


def check_kernels(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sizes = BLIP2,
    *,
    again: bool = False,
    jobs: int | None = None,
    tell: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Check the kernels used by both stages and inference that have no record yet.

    The first call of a kind does the same for that kind; checking in advance is faster.

    Args:
        device: A CUDA device; by default the current one.
        dtype: Compute precision.
        sizes: Of the model.
        again: Check everything, even kernels that have a record.
        jobs: Number of parallel compile processes; by default one per core, up to 8.
        tell: Called with each new record as soon as it is made.

    Returns:
        One record for each kind and backend, old and new; empty without a GPU.
    """
    place = _place(device)
    if place is None:
        return []
    jobs = min(os.cpu_count() or 1, 8) if jobs is None else jobs
    records: list[Record] = []
    with kernels_set_to("check"):
        # a kernel's rival is known only once the backends after it are checked
        rounds: dict[int, dict[Request, None]] = {}
        calls = usual_calls(place, dtype, sizes)
        for behind in range(max(len(backends) for _, backends, _ in calls)):
            requests = rounds.setdefault(behind, {})
            for op, backends, call in calls:
                request = _request(op, backends, behind, call)
                if request is not None:
                    requests[request] = None
            if requests:
                records += checks().settle(list(requests), again, jobs, tell)
    return records


@dataclass(frozen=True)
class OpChoice:
    """What `auto` would run for one kind of call, from records alone.

    Attributes:
        op, kind: The op and its kind of call.
        backend: The backend that would run, if nothing else were checked.
        passed_over: Why each backend before it would not, by name.
    """

    op: str
    kind: str
    backend: str
    passed_over: dict[str, str]


def op_choices(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, sizes: Sizes = BLIP2
) -> list[OpChoice]:
    """What `auto` would run for the calls of both stages and of inference; runs no check.

    Args:
        device: Of the calls.
        dtype: Compute precision.
        sizes: Of the model.
    """
    found: dict[tuple[str, str], OpChoice] = {}
    for op, backends, call in usual_calls(torch.device(device), dtype, sizes):
        kinds = [backend.check.kind(call) for backend in backends if backend.check is not None]
        reasons: dict[str, str] = {}
        for backend in backends:
            reason = "; ".join(
                backend.not_supported_reasons(call) or backend.not_automatic_reasons(call)
            )
            if not reason and backend.check is not None:
                check = backend.check
                what = (op, backend.name, check.kind(call), check.device(call))
                (record,) = checks().find([Request(*what, check.folder, check.source)])
                reason = UNCHECKED if record is None else record.reason
            if not reason:
                found.setdefault(
                    (op, kinds[0]), OpChoice(op, kinds[0], backend.name, dict(reasons))
                )
                break
            reasons[backend.name] = reason
    return list(found.values())


def kernel_records(device: torch.device | str | None = None) -> list[Record]:
    """The existing records of kernels on a device, for all kinds of calls; runs no check.

    Args:
        device: By default the current CUDA device.

    Returns:
        Records from this process, the user's file and the package that match this card, these
        versions and this code; empty without a GPU.
    """
    place = _place(device)
    return [] if place is None else checks().of_machine(str(place), current_codes())


def current_codes() -> set[str]:
    """Hashes of the current kernel code."""
    tables: dict[str, Sequence[Backend[Any]]] = {
        "bias_gelu": GELU_BACKENDS,
        "dropout_add_layer_norm": NORM_BACKENDS,
        "qformer_attention": ATTENTION_BACKENDS,
        "qformer_cross_attention": ATTENTION_BACKENDS,
        "itc_loss": ITC_BACKENDS,
    }
    return {
        code_hash(op, backend.check.folder, backend.name)
        for op, backends in tables.items()
        for backend in backends
        if backend.check is not None
    }


def _place(device: torch.device | str | None) -> torch.device | None:
    """The device with its index; None if no device is given and there is no GPU."""
    if device is None and not torch.cuda.is_available():
        return None
    place = torch.device("cuda" if device is None else device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def _request(op: str, backends: Sequence[Backend[Any]], behind: int, call: Any) -> Request | None:
    """The request for the checked backend that has `behind` checked backends after it."""
    checked = [i for i, backend in enumerate(backends) if backend.check is not None]
    if behind >= len(checked):
        return None
    place = checked[-1 - behind]
    backend = backends[place]
    check = backend.check
    if check is None or backend.not_supported_reasons(call):
        return None
    rival = rival_of(op, backends, place, call)
    what = (op, backend.name, check.kind(call), check.device(call), check.folder, check.source)
    return Request(*what, rival)
