"""Loads transformers language models by folder or hub name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from blip2fast.frozen.local_models import not_found


def load_language_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal or encoder-decoder language model by folder or hub name.

    Raises:
        ValueError: not found.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("language model", name, error)) from error


def quantised_fault(what: str, name: str, config: Any) -> str | None:
    """Why a model quantised by torchao, bitsandbytes or another library cannot be moved.

    Its stored tensors have other names, dtypes and shapes than the weights it computes with.

    Args:
        what: as in `not_found`.
        name: folder or hub name.
        config: the model's transformers config.

    Returns:
        The error message; None if the model is not quantised.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return (
        f"{what} {name!r}: its weights are quantised (quant_method {method!r}); a run, streaming "
        "and ZeRO-3 move plain ones: take the model as it was before, with offload: stream and "
        "stream_storage: int8 or int4 (in Python, Blip2Stage2 takes such a model as it is)"
    )
