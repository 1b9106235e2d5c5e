"""The calls of both stages and of inference, so that their kernels can be checked beforehand."""

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
    """Of a Q-Former and its data; by default BLIP-2's.

    Attributes:
        hidden: C, width of the Q-Former.
        heads: H.
        queries: Q.
        text: Tokens of the longest text, 0 for none.
        images: S, tokens of an image.
        features: Width of the contrastive features, 0 for no contrast.
        dropout: Whether a training run drops anything.
    """

    hidden: int = 768
    heads: int = 12
    queries: int = 32
    text: int = 32
    images: int = 257
    features: int = 256
    dropout: bool = True


BLIP2 = Sizes()
OpCall = tuple[str, Sequence[Backend[Any]], Any]


def usual_calls(device: torch.device, dtype: torch.dtype, sizes: Sizes = BLIP2) -> list[OpCall]:
    """What both stages and inference ask of the ops, one call of each kind.

    Args:
        device: Where.
        dtype: The computing precision; parameters of training are in fp32.
        sizes: Of the model.

    Returns:
        The op's name, its backends and a call, each.
    """
    where: dict[str, Any] = {"device": device.type, "gpu": device.index}
    capability = capability_of(device)
    wide, drops = torch.float32, (False, True) if sizes.dropout else (False,)
    calls: list[OpCall] = []
    # what takes longest to compile comes first
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
    # under autocast parameters are in fp32, in train.py and in inference all is in `dtype`
    for parameters in dict.fromkeys((wide, dtype)):
        gelu_call = BiasGeluCall(dtype, bias=parameters, **where)
        calls.append(("bias_gelu", GELU_BACKENDS, gelu_call))
        # with a copy for the next product, and where there is none
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
    """Check the kernels that both stages and inference would run, where nobody has yet.

    A first use does the same for the kind of its call; this does it beforehand, and faster.

    Args:
        device: A CUDA device; by default the current one.
        dtype: The computing precision.
        sizes: Of the model.
        again: Check all, whatever is known.
        jobs: Processes that compile side by side; by default as many as there are cores, up to 8.
        tell: Gets each record that is made, at once.

    Returns:
        What is known afterwards, one record for each kind and backend; none without a GPU.
    """
    place = _place(device)
    if place is None:
        return []
    jobs = min(os.cpu_count() or 1, 8) if jobs is None else jobs
    records: list[Record] = []
    with kernels_set_to("check"):
        # who races against a kernel is known once those behind it are
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


def kernel_records(device: torch.device | str | None = None) -> list[Record]:
    """What is known of the kernels on a device, of any kind of call; nothing is checked.

    Args:
        device: By default the current CUDA device.

    Returns:
        The records of this process, of the user's file and of the package that hold for this
        card, these versions and this code; none without a GPU.
    """
    place = _place(device)
    return [] if place is None else checks().of_machine(str(place), current_codes())


def current_codes() -> set[str]:
    """Hashes of the code that there is now."""
    tables: tuple[Sequence[Backend[Any]], ...]
    tables = (GELU_BACKENDS, NORM_BACKENDS, ATTENTION_BACKENDS, ITC_BACKENDS)
    return {
        code_hash(backend.check.folder, backend.name)
        for backends in tables
        for backend in backends
        if backend.check is not None
    }


def _place(device: torch.device | str | None) -> torch.device | None:
    """The device with its index; None where no GPU is meant and none is there."""
    if device is None and not torch.cuda.is_available():
        return None
    place = torch.device("cuda" if device is None else device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def _request(op: str, backends: Sequence[Backend[Any]], behind: int, call: Any) -> Request | None:
    """Of the kernels that have `behind` backends with kernels after them."""
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
